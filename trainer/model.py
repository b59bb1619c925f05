"""Loading the policy: model and tokenizer.

Weights are read from safetensors only and kept in float32; autocast does the rest.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trainer.attention import loaded_implementation
from trainer.checkpoint import Checkpoint
from trainer.config import DataSettings, LoraSettings, ModelSettings, TrainSettings
from trainer.errors import CheckpointError, ConfigurationError, DamagedCheckpoint
from trainer.samples import ModelLimits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The model being trained and what belongs to it."""

    model: nn.Module
    """A causal language model of transformers, float32, perhaps with adapters."""
    tokenizer: PreTrainedTokenizerBase
    limits: ModelLimits
    stored_dtype: torch.dtype
    """The type in which the base checkpoint is stored, which servers usually serve."""


def load_policy(settings: ModelSettings, data: DataSettings, checkpoint: Checkpoint | None = None) -> Policy:
    """Load model and tokenizer, the base weights or those of a checkpoint.

    Raises:
        ConfigurationError: The path holds no usable checkpoint, or adapters are asked for without peft.
    """
    options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    resumed_whole = checkpoint is not None and settings.lora is None
    path = str(checkpoint.model_path) if checkpoint is not None and resumed_whole else settings.path
    try:
        config = AutoConfig.from_pretrained(path, **options)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            attn_implementation=loaded_implementation(settings.attention),
            use_safetensors=True,
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer_path or settings.path, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ConfigurationError(
            f"model.path {path!r} cannot be loaded: {error}. It must be a Hugging Face checkpoint "
            "directory with safetensors weights and a tokenizer, or a hub id."
        ) from error
    if settings.gradient_checkpointing:
        _recompute_activations(model)
    limits = ModelLimits(
        vocabulary_size=model.get_input_embeddings().num_embeddings,
        max_sequence_length=_context_length(config, data.max_sequence_length),
    )
    stored_dtype = _stored_dtype(config)
    if checkpoint is not None:
        stored_dtype = getattr(torch, checkpoint.state.stored_dtype)
    if settings.lora is not None:
        model = _with_adapters(model, settings.lora, checkpoint)
    return Policy(model=model, tokenizer=tokenizer, limits=limits, stored_dtype=stored_dtype)


def _recompute_activations(model: Any) -> None:
    """Switch activation recomputation on, by its newer or its older name in transformers."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _context_length(config: Any, wanted: int | None) -> int:
    context = getattr(config, "max_position_embeddings", None)
    if wanted is None:
        return int(context) if context else 1 << 30
    if context and wanted > context:
        raise ConfigurationError(
            f"data.max_sequence_length {wanted} is beyond the model's context of {context}"
        )
    return wanted


def _stored_dtype(config: Any) -> torch.dtype:
    """The checkpoint's own dtype by its config.json; float32 where that says nothing."""
    stored = getattr(config, "dtype", None)
    if isinstance(stored, str):
        stored = getattr(torch, stored, None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _with_adapters(model: nn.Module, settings: LoraSettings, checkpoint: Checkpoint | None) -> nn.Module:
    """Put fresh adapters, or those of a checkpoint, around the base weights."""
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
        from peft.utils import SAFETENSORS_WEIGHTS_NAME
    except ImportError as error:
        raise ConfigurationError(
            "model.lora needs the package peft: pip install 'atropos-trainer[lora]'"
        ) from error
    adapted: nn.Module
    if checkpoint is not None:
        if checkpoint.adapter_path is None:
            raise CheckpointError(
                f"{checkpoint.path} holds no adapters, but model.lora is set; "
                "resume with the settings of the run"
            )
        if not (checkpoint.adapter_path / SAFETENSORS_WEIGHTS_NAME).is_file():
            # PEFT would take a file of another name then, which is a pickle.
            raise DamagedCheckpoint(f"{checkpoint.adapter_path} has no {SAFETENSORS_WEIGHTS_NAME}")
        try:
            adapted = PeftModel.from_pretrained(model, checkpoint.adapter_path, is_trainable=True)
        except (OSError, ValueError, SafetensorError) as error:
            raise DamagedCheckpoint(f"{checkpoint.adapter_path} cannot be read: {error}") from error
        return adapted
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=settings.target_modules,
            task_type="CAUSAL_LM",
        ),
    )
    return adapted


def choose_mixed_precision(settings: TrainSettings, device: torch.device) -> Literal["no", "bf16"]:
    """Resolve `train.mixed_precision`: bf16 where the hardware multiplies it natively.

    On a CPU without such instructions bfloat16 is emulated and several times slower than float32, so the
    decision is by capability; a timing would make the same seed give different runs.
    """
    if settings.mixed_precision != "auto":
        return settings.mixed_precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "no"
    return "no"

"""Loads the policy: model and tokenizer.

Weights are read from safetensors only, in float32: what is decided by them is decided before they are cast.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PretrainedConfig

from atropos_client.readable import require_readable
from trainer.config import DataSettings, LoraSettings, ModelSettings, TrainSettings
from trainer.errors import CheckpointError, ConfigurationError, DamagedCheckpoint
from trainer.model.attention import loaded_implementation
from trainer.model.base_checkpoint import BaseCheckpoint, read_base
from trainer.model.own_rows import LoadedModel, load
from trainer.model.pretrained import LOADING_ERRORS, load_structure, weights_identity
from trainer.model.sharding import Spread
from trainer.model.tokenizer import load_tokenizer, require_directory_or_hub_id
from trainer.model.weight_stream import WeightStream
from trainer.samples.validation import ModelLimits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_NOISE_NAMES = re.compile(r"^(?!classifier|summary).*(drop|jitter)")
"""Attributes of configurations and modules: dropout, attn_pdrop, layerdrop, router_jitter_noise; not those of
heads that no causal language model has."""


DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Types of weights in training, by `model.dtype`."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The model being trained and what belongs to it."""

    model: nn.Module
    """A causal language model of transformers, perhaps with adapters."""
    tokenizer: PreTrainedTokenizerBase
    limits: ModelLimits
    base: BaseCheckpoint
    """The base model, whose layout everything that is written has."""
    base_weights: str | None
    """Which weights the adapters belong to, see `weights_identity`; None without adapters."""
    loaded: LoadedModel
    """The same model; until it has been spread over processes, perhaps without its weights."""


def load_policy(
    settings: ModelSettings,
    data: DataSettings,
    trained: Path | None = None,
    *,
    base_weights: str | None = None,
    rows_only: bool = False,
) -> Policy:
    """Load model and tokenizer, the base weights or those that a run has trained.

    Args:
        settings: Section `model`.
        data: Section `data`.
        trained: What a checkpoint holds of the policy: the whole model, or, with `model.lora`, the adapters
            alone. None: begin with the base weights.
        base_weights: The identity of the weights that those adapters were trained on. None: not known.
        rows_only: Leave the weights unread where that is possible: see `LoadedModel.spread_over`.

    Raises:
        ConfigurationError: The path holds no usable checkpoint, those adapters belong to other base
            weights, or what is trained could not be written as the base is.
    """
    resumed_whole = trained is not None and settings.lora is None
    path = str(trained) if resumed_whole else settings.path
    with _explained("the checkpoint's model" if resumed_whole else "model.path", path):
        attention = loaded_implementation(settings.attention)
        loaded = load(
            path, trust_remote_code=settings.trust_remote_code, attention=attention, rows_only=rows_only
        )
    model = loaded.model
    tokenizer = load_policy_tokenizer(settings)
    base = _read_base(settings)
    for each in loaded.both:
        if settings.dropout == "none":
            _switch_dropout_off(each)
        if settings.gradient_checkpointing:
            _recompute_activations(each)
    limits = ModelLimits(
        vocabulary_size=model.get_input_embeddings().num_embeddings,
        max_sequence_length=context_length(model.config.get_text_config(), data.max_sequence_length),
    )
    identity = None
    if settings.lora is not None:
        identity = weights_identity(model, loaded.rows.whole if loaded.rows is not None else None)
        if base_weights not in (None, identity):
            raise ConfigurationError(
                f"the adapters in {trained} were trained on other base weights than those that "
                f"model.path {settings.path!r} holds now; give it the base of the run, or start anew with "
                "another train.output_dir"
            )
        with loaded.filled():
            model = _with_adapters(model, settings.lora, trained)
        loaded.model = model
        if loaded.first_layers is not None:
            with torch.random.fork_rng(devices=[]):  # what is drawn for a test must not change the run
                loaded.first_layers = _with_adapters(loaded.first_layers, settings.lora, None)
    _refuse_unwritable(settings.path, model, base)
    return Policy(
        model=model,
        tokenizer=tokenizer,
        limits=limits,
        base=base,
        base_weights=identity,
        loaded=loaded,
    )


def reads_rows_only(settings: ModelSettings, spread: Spread) -> bool:
    """Whether weights are read only when their type and place are settled: whole they take 4 bytes each."""
    return spread.sharded or settings.dtype != "float32"


def load_beside(setting: str, path: str, settings: ModelSettings, *, rows_only: bool = False) -> LoadedModel:
    """Load a model that is used beside the policy: float32, on the CPU, without dropout.

    Args:
        setting: Which setting names it, for messages.
        path: Directory, or hub id.
        settings: Section `model`, for its attention and whether code beside the weights may run.
        rows_only: See `load_policy`.

    Raises:
        ConfigurationError: The path holds no usable checkpoint.
    """
    with _explained(setting, path):
        loaded = load(
            path,
            trust_remote_code=settings.trust_remote_code,
            attention=loaded_implementation(settings.attention),
            setting=setting,
            rows_only=rows_only,
        )
    for each in loaded.both:
        _switch_dropout_off(each)
    return loaded


def inspect_beside(setting: str, path: str, settings: ModelSettings) -> Any | None:
    """Build the model that `load_beside` would load, without its weights; None for a hub id.

    Raises:
        ConfigurationError: It cannot be loaded, or not every tensor is accounted for.
    """
    with _explained(setting, path):
        return load_structure(path, trust_remote_code=settings.trust_remote_code, setting=setting)


def load_policy_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to the model.

    Raises:
        ConfigurationError: See `load_tokenizer`.
    """
    setting = "model.tokenizer_path" if settings.tokenizer_path else "model.path"
    path = settings.tokenizer_path or settings.path
    return load_tokenizer(setting, path, trust_remote_code=settings.trust_remote_code)


def inspect_model(settings: ModelSettings) -> Any | None:
    """Build the model of `model.path` without its weights; None for a hub id, which may not be here yet.

    Raises:
        ConfigurationError: It cannot be loaded, not every tensor is accounted for, or what is trained could
            not be written as the base is.
    """
    with _explained("model.path", settings.path):
        structure = load_structure(settings.path, trust_remote_code=settings.trust_remote_code)
    if structure is not None:
        model = copy.deepcopy(structure)
        if settings.lora is not None:
            model = _with_adapters(model, settings.lora, None)
        _refuse_unwritable(settings.path, model, _read_base(settings))
    return structure


def _read_base(settings: ModelSettings) -> BaseCheckpoint:
    if settings.tokenizer_path is not None:
        require_directory_or_hub_id("model.tokenizer_path", settings.tokenizer_path)
    with _explained("model.path", settings.path):
        return read_base(
            settings.path,
            tokenizer_path=settings.tokenizer_path,
            trust_remote_code=settings.trust_remote_code,
        )


def _refuse_unwritable(path: str, model: nn.Module, base: BaseCheckpoint) -> None:
    try:
        WeightStream(model, base)
    except CheckpointError as error:
        raise ConfigurationError(f"model.path {path!r} cannot be trained: {error}") from error


@contextmanager
def _explained(setting: str, path: str) -> Iterator[None]:
    """Translate what transformers raises while it loads from `path`."""
    try:
        require_readable(path)
        yield
    except ConfigurationError:
        raise
    except LOADING_ERRORS as error:
        raise ConfigurationError(
            f"{setting} {path!r} cannot be loaded: {error}. It must be a Hugging Face checkpoint directory "
            "with safetensors weights and a tokenizer, or a hub id."
        ) from error


def dropout_rates(model: nn.Module) -> dict[str, float]:
    """Finds the rates above zero, by name, at which a model drops values or adds noise while it trains."""
    return {name: rate for _, name, rate in _noise(model)}


def _switch_dropout_off(model: nn.Module) -> None:
    """Let the model compute in training what a sampler computes; adapters come later and keep theirs.

    With dropout the trainer's log-probs are those of a random part of the model: an importance ratio to the
    sampler's says nothing then.
    """
    if rates := dropout_rates(model):
        found = ", ".join(f"{name} {rate:g}" for name, rate in sorted(rates.items()))
        logger.info("The model's dropout is off in training (%s); model.dropout keep leaves it on", found)
    for owner, name, _ in list(_noise(model)):
        setattr(owner, name.rpartition(".")[2], 0.0)


def _noise(model: Any) -> Iterator[tuple[Any, str, float]]:
    """Owner, name and value of each rate: of the configuration and its parts, and of the modules."""
    configs, found = [model.config], []
    while configs:
        config = configs.pop()
        found.append((type(config).__name__, config))
        configs += [part for part in vars(config).values() if isinstance(part, PretrainedConfig)]
    found += [(type(module).__name__, module) for module in model.modules()]
    for kind, owner in found:
        for name, value in list(vars(owner).items()):
            named = _NOISE_NAMES.search(name) or (isinstance(owner, _DropoutNd) and name == "p")
            if named and isinstance(value, float) and value > 0:
                yield owner, f"{kind}.{name}", value


def _recompute_activations(model: Any) -> None:
    """Switch activation recomputation on, by its newer or its older name in transformers."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def context_length(config: Any, wanted: int | None) -> int:
    """Longest sequence in tokens for `data.max_sequence_length`; without it, the model's context."""
    context = getattr(config, "max_position_embeddings", None)
    if wanted is None:
        return int(context) if context else 1 << 30
    if context and wanted > context:
        raise ConfigurationError(
            f"data.max_sequence_length {wanted} is beyond the model's context of {context}"
        )
    return wanted


def _with_adapters(model: nn.Module, settings: LoraSettings, trained: Path | None) -> nn.Module:
    """Put fresh adapters, or those that were trained before, around the base weights."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    adapted: nn.Module
    if trained is not None:
        if not (trained / SAFETENSORS_WEIGHTS_NAME).is_file():
            # PEFT would take a file of another name then, which is a pickle.
            raise DamagedCheckpoint(f"{trained} has no {SAFETENSORS_WEIGHTS_NAME}")
        try:
            require_readable(trained)
            adapted = PeftModel.from_pretrained(model, trained, is_trainable=True)
        except (OSError, ValueError, SafetensorError) as error:
            raise DamagedCheckpoint(f"{trained} cannot be read: {error}") from error
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

"""A LoRA adapter as an ordinary PEFT directory, written whole or not at all.

The directory holds `adapter_model.safetensors` and `adapter_config.json`, under PEFT's own tensor names;
`PeftModel.from_pretrained` and servers that take adapters read it. Base weights are never in it.

Data flow: model -> the adapter's tensors, copied -> atomic directory. A checkpoint's adapter is not written
here but by PEFT itself, because a resumed run needs everything that PEFT knows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from atropos_client.private_files import PRIVATE_DIRECTORY
from trainer.errors import CheckpointError
from trainer.export.atomic_directory import atomic_directory
from trainer.model.sharding import WHOLE, Spread
from trainer.model.wrappers import unwrap_training

PLAIN_INITIALIZATIONS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""The ways to start an adapter, beside PEFT's default, that leave the base weights as they are."""


@dataclass(frozen=True)
class CapturedAdapter:
    """An adapter that is ready to be written, from any thread."""

    weights: Mapping[str, Tensor]
    """PEFT's names, without the adapter's own name, to copies on the CPU."""
    configuration: Any
    """PEFT's configuration, a copy."""
    dtype: str
    """Name of the tensors' type, e.g. `bfloat16`."""

    @property
    def weight_bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for tensor in self.weights.values())

    def write(self, path: Path, *, durable: bool = True, mode: int = PRIVATE_DIRECTORY) -> None:
        """Write the directory `path`, atomically; for the arguments see `atomic_directory`.

        Raises:
            CheckpointError: The file system refused.
        """
        try:
            with atomic_directory(path, durable=durable, mode=mode) as directory:
                weights = dict(self.weights)
                save_file(weights, directory / "adapter_model.safetensors", metadata={"format": "pt"})
                self.configuration.save_pretrained(directory)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot write the adapter to {path}: {error}") from error


def capture_adapter(
    model: nn.Module, *, dtype: torch.dtype | None = None, spread: Spread = WHOLE
) -> CapturedAdapter:
    """Copy the active adapter's tensors to the CPU, so that they can be written while the model trains on.

    Where weights are spread over processes, all of them call it, and process 0 alone gets the tensors.

    Args:
        model: A PEFT model, possibly inside DistributedDataParallel or torch.compile.
        dtype: The tensors are cast to it. None: as they are.
        spread: How weights are spread.

    Raises:
        CheckpointError: The model has no adapter, or one of a kind that inference servers do not load.
    """
    adapted = unwrap_training(model)
    if not hasattr(adapted, "peft_config"):
        raise CheckpointError(f"{type(adapted).__name__} has no adapter; set model.lora")
    from peft import get_peft_model_state_dict

    names = list(adapted.active_adapters)
    if len(names) != 1:
        raise CheckpointError(
            f"the model has {len(names)} active adapters, {names}; exactly one is published"
        )
    configuration = adapted.peft_config[names[0]]
    if found := unservable_features(configuration):
        raise CheckpointError(
            f"inference servers do not load this adapter: it has {', '.join(found)}; train with plain LoRA, "
            "or set publish.transport to disk, which publishes merged weights"
        )
    found_weights = get_peft_model_state_dict(
        adapted,
        # The embedding that an adapter may adapt is the base model's and stays there; asked to decide for
        # itself, PEFT would look the base model up on the hub.
        adapter_name=names[0],
        save_embedding_layers=False,
    )
    if not found_weights:
        raise CheckpointError("the model's adapter has no tensors; see model.lora.target_modules")
    weights = {}
    for name, tensor in found_weights.items():
        kind = dtype or tensor.dtype
        whole = spread.whole_on(tensor.detach().to(kind), 0)
        if whole is not None:
            weights[name.replace("_orig_mod.", "")] = whole.to("cpu", copy=True).contiguous()
    stored = copy.deepcopy(configuration)
    stored.inference_mode = True
    for option, value in list(vars(stored).items()):
        if isinstance(value, set):  # PEFT would write it in an order that each process has of its own
            setattr(stored, option, sorted(value))
    return CapturedAdapter(weights, stored, str(kind).removeprefix("torch."))


def unservable_features(configuration: Any) -> list[str]:
    """List what a PEFT configuration asks for that vLLM refuses, or would leave out without a word.

    Args:
        configuration: A `LoraConfig`, of any version of PEFT.
    """
    kind = getattr(configuration.peft_type, "value", configuration.peft_type)
    if kind != "LORA":
        return [f"the type {kind} instead of LORA"]

    def option(name: str) -> Any:
        return getattr(configuration, name, None)

    found = [
        f"{name}={option(name)!r}"
        for name in (
            "use_dora",
            "lora_bias",
            "modules_to_save",
            "trainable_token_indices",
            "alora_invocation_tokens",
            "layer_replication",
            "use_qalora",
            "use_bdlora",
            "arrow_config",
            "kasa_config",
            "monteclora_config",
        )
        if option(name)
    ]
    if option("bias") not in (None, "none"):
        found.append(f"bias={option('bias')!r}")
    start = option("init_lora_weights")
    if isinstance(start, str) and start.lower() not in PLAIN_INITIALIZATIONS:
        found.append(f"init_lora_weights={start!r}, which changes the base weights")
    return found

"""A model as an ordinary Hugging Face directory, written whole or not at all.

The directory holds the configuration, the generation configuration, safetensors and the tokenizer; any
server or `from_pretrained` reads it. Tensor names are the checkpoint's own: wrappers that training puts
around a model (DistributedDataParallel, torch.compile, PEFT) are stripped, LoRA adapters are merged into
the weights they adapt, and tied weights are written once.

Data flow: model -> plain state dict -> checked against the model's names -> cast -> atomic directory.
"""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors import SafetensorError
from torch import Tensor, nn

from atropos_client.private_files import PRIVATE_DIRECTORY
from trainer.atomic_directory import atomic_directory
from trainer.errors import CheckpointError

_SAVING = threading.Lock()
_LORA_PARAMETERS = ("lora_A.", "lora_B.", "lora_embedding_A.", "lora_embedding_B.")


def write_model_directory(
    path: Path,
    *,
    model: nn.Module,
    tokenizer: Any | None,
    state_dict: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    replace: bool = False,
) -> None:
    """Write `model` as the directory `path`, atomically.

    Args:
        path: The directory's final name. It appears only when everything in it is on the disk.
        model: A transformers model, possibly inside DistributedDataParallel, torch.compile or PEFT.
        tokenizer: A transformers tokenizer to put beside the weights, or None.
        state_dict: The weights, when the model's own are not to be used (gathered from several
            processes, merged). Names may still carry the wrappers' prefixes. None: the model's.
        dtype: Floating-point weights are cast to it, except those that the architecture keeps in
            float32. None: as they are.
        replace: Put the new directory in the place of an existing one.

    Raises:
        CheckpointError: A weight is missing or unknown, weights that the model ties differ, the model
            cannot be written in this format, or the file system refused. `path` is then as it was.
    """
    _capture(model, tokenizer, state_dict, dtype, copy=False).write(path, replace=replace)


def capture_model(
    model: nn.Module, *, tokenizer: Any | None, dtype: torch.dtype | None = None
) -> CapturedModel:
    """Copy a model's weights to the CPU, so that they can be written while the model trains on.

    The copy has the size of the model in `dtype`.

    Args:
        model: See `write_model_directory`.
        tokenizer: A transformers tokenizer to put beside the weights, or None.
        dtype: See `write_model_directory`.

    Raises:
        CheckpointError: The weights are not those that the model should have.
    """
    return _capture(model, tokenizer, None, dtype, copy=True)


@dataclass(frozen=True)
class CapturedModel:
    """Weights that are ready to be written, from any thread."""

    inner: Any
    """The transformers model, for its configuration and its names only."""
    tokenizer: Any | None
    weights: Mapping[str, Tensor]
    dtype: torch.dtype
    """The type that most of the numbers have."""

    @property
    def weight_bytes(self) -> int:
        """Size of all weights, tied ones once."""
        sizes = {_memory(tensor): tensor.nbytes for tensor in self.weights.values()}
        return sum(sizes.values())

    def write(
        self, path: Path, *, replace: bool = False, durable: bool = True, mode: int = PRIVATE_DIRECTORY
    ) -> None:
        """Write the directory `path`, atomically; for the arguments see `atomic_directory`.

        Raises:
            CheckpointError: The model cannot be written in this format, or the file system refused.
        """
        try:
            with atomic_directory(path, replace=replace, durable=durable, mode=mode) as directory:
                _save(self.inner, self.weights, directory)
                _finish_config(directory / "config.json", self.dtype)
                if self.tokenizer is not None:
                    self.tokenizer.save_pretrained(directory)
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"cannot write the model to {path}: {error}") from error


def _capture(
    model: nn.Module,
    tokenizer: Any | None,
    state_dict: Mapping[str, Tensor] | None,
    dtype: torch.dtype | None,
    *,
    copy: bool,
) -> CapturedModel:
    inner = unwrap(model)
    weights = _complete(inner, plain_state_dict(model) if state_dict is None else state_dict)
    weights = _cast(weights, dtype, keep=float32_names(inner, weights, dtype), copy=copy)
    return CapturedModel(inner=inner, tokenizer=tokenizer, weights=weights, dtype=_dtype_of(weights))


def unwrap(model: nn.Module) -> Any:
    """Return the transformers model inside DistributedDataParallel, torch.compile and PEFT wrappers."""
    inner = unwrap_training(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def unwrap_training(model: nn.Module) -> Any:
    """Return the model inside DistributedDataParallel and torch.compile: PEFT's, if it has adapters."""
    while True:
        inner = extract_model_from_parallel(model, keep_torch_compile=False)
        if inner is model:
            return model
        model = inner


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's weights under the checkpoint's names, LoRA adapters merged, the model untouched.

    Merging is `W + scale * B A`, computed by PEFT for the active adapters, in the dtype of `W`. It costs
    a second copy of the adapted weights only.

    Raises:
        CheckpointError: An adapter is of a kind whose effect is not a sum with the weight
            (DoRA, an adapter with a bias).
    """
    inner = unwrap(model)
    weights = checkpoint_names(inner)
    for name, module in inner.named_modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer"):
            weights[f"{name}.weight"] = merged_weight(name, module)
    return weights


def merged_weight(name: str, module: Any) -> Tensor:
    """Return one adapted layer's weight with its active adapters merged in; a new tensor if there are any.

    Args:
        name: The layer's name, for messages.
        module: PEFT's LoRA layer.

    Raises:
        CheckpointError: See `plain_state_dict`.
    """
    weight: Tensor = module.base_layer.weight.detach()
    if module.merged:  # PEFT has added the adapter into the weight already
        return weight
    for adapter in module.active_adapters:
        if adapter not in module.lora_A and adapter not in module.lora_embedding_A:
            continue
        if adapter in module.lora_variant or module.lora_bias.get(adapter, False):
            raise CheckpointError(
                f"{name} has an adapter that is more than a sum with the weight (DoRA and other variants, "
                "or an adapter with a bias), which cannot be merged; train with plain LoRA"
            )
        with torch.no_grad():
            weight = weight + module.get_delta_weight(adapter).to(weight)
    return weight


def _complete(inner: Any, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check `given` against the model's names; let tied names share one tensor.

    A directory that lacks a tensor would load with random values in its place, so it is never written.
    """
    own = checkpoint_names(inner)
    weights = {_own_name(name, own): tensor for name, tensor in given.items()}
    if unknown := sorted(weights.keys() - own.keys()):
        raise CheckpointError(
            f"{len(unknown)} weights are not part of {type(inner).__name__}, first: {unknown[0]!r}"
        )
    for names in _tied(own):
        present = [name for name in names if name in weights]
        if not present:
            continue
        first = weights[present[0]]
        for name in present[1:]:
            if not _same_memory(weights[name], first) and not torch.equal(weights[name], first):
                raise CheckpointError(f"{name} and {present[0]} are tied in the model but differ")
        weights |= dict.fromkeys(names, first)
    if missing := sorted(own.keys() - weights.keys()):
        raise CheckpointError(
            f"{len(missing)} weights of {type(inner).__name__} are missing, first: {missing[0]!r}"
        )
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"{name} has shape {list(tensor.shape)}, the model's has {list(own[name].shape)}"
            )
    return weights


def checkpoint_names(inner: nn.Module) -> dict[str, Tensor]:
    """Return the names that a checkpoint of `inner` has to hold, each with the model's own tensor."""
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in inner.state_dict().items()
        if not any(part in name for part in _LORA_PARAMETERS)
    }


def _own_name(name: str, own: Mapping[str, Tensor]) -> str:
    """Strip the prefixes of wrappers from a name, unless the model itself has that name."""
    if name in own:
        return name
    stripped = name.replace("_orig_mod.", "").replace(".base_layer.", ".")
    for prefix in ("module.", "base_model.model."):
        if stripped not in own:
            stripped = stripped.removeprefix(prefix)
    return stripped


def _tied(own: Mapping[str, Tensor]) -> list[list[str]]:
    """Groups of names that are one tensor in the model."""
    by_memory: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, tensor in own.items():
        by_memory[_memory(tensor)].append(name)
    return [names for names in by_memory.values() if len(names) > 1]


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    place = tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return (*place, tuple(tensor.shape), tensor.stride())


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one is other or _memory(one) == _memory(other)


def float32_names(inner: Any, weights: Collection[str], dtype: torch.dtype | None) -> set[str]:
    """Weights that the architecture keeps in float32 because half precision ruins them."""
    if dtype not in (torch.bfloat16, torch.float16):
        return set()
    patterns = set(getattr(inner, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        patterns |= set(getattr(inner, "_keep_in_fp32_modules", None) or ())
    return {name for name in weights if any(pattern in name.split(".") for pattern in patterns)}


def _cast(
    weights: Mapping[str, Tensor], dtype: torch.dtype | None, keep: set[str], *, copy: bool
) -> dict[str, Tensor]:
    """Move to the CPU in `dtype`; names that shared memory still share it.

    `copy`: into memory of their own, even where nothing has to be moved or cast.
    """
    done: dict[tuple[Any, ...], Tensor] = {}
    result = {}
    for name, tensor in weights.items():
        memory = _memory(tensor)
        if memory not in done:
            target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            kind = tensor.dtype if name in keep else target
            done[memory] = tensor.detach().to("cpu", kind, copy=copy)
        result[name] = done[memory]
    return result


def _save(inner: Any, weights: Mapping[str, Tensor], directory: Path) -> None:
    """Let transformers write, because only it knows how an architecture's names map to checkpoint names."""
    with _SAVING:  # a publish and a checkpoint may be written at the same time
        before = inner.config.dtype
        try:
            inner.save_pretrained(directory, state_dict=dict(weights))  # it empties what it is given
        finally:
            inner.config.dtype = before  # save_pretrained overwrites it with the training dtype


def _dtype_of(weights: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that most floating-point numbers have."""
    numbers: dict[torch.dtype, int] = defaultdict(int)
    for tensor in weights.values():
        if tensor.is_floating_point():
            numbers[tensor.dtype] += tensor.numel()
    return max(numbers, key=lambda dtype: numbers[dtype])


def _finish_config(config_file: Path, dtype: torch.dtype) -> None:
    """Make the configuration agree with the weights beside it, for every reader.

    Servers choose their computing type by `dtype`. transformers 4 and what builds on it look for
    `rope_theta` at the top, where version 5 no longer writes it, and would quietly take a default.
    """
    config = json.loads(config_file.read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    config.pop("torch_dtype", None)
    config["dtype"] = name
    for section in config.values():  # e.g. the text part of a multi-modal model
        if isinstance(section, dict) and "dtype" in section:
            section["dtype"] = name
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

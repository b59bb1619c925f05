"""Reading checkpoints and putting them into a running model, whole or not at all.

Only safetensors are read: other formats can run code. Names, shapes and kinds of numbers must be those of the
served model; all of that is checked, and every tensor is in memory, before the first one is replaced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from local_stack.inference.errors import CheckpointMismatch

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_MOST_NAMES_IN_MESSAGE = 5


class WeightTargets:
    """The tensors of a model that a checkpoint fills, by name; tied weights share one tensor.

    Args:
        model: A transformers model, freshly loaded: weights that are tied now count as one for ever.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        named: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
        persistent = model.state_dict(keep_vars=True)
        named.update({name: tensor for name, tensor in persistent.items() if name not in named})
        by_identity: dict[int, list[str]] = {}
        for name, tensor in named.items():
            by_identity.setdefault(id(tensor), []).append(name)
        self._groups = list(by_identity.values())
        self._tensors = named

    def retarget(self, name: str, tensor: torch.Tensor) -> None:
        """Fill `tensor` from now on wherever `name` was filled, e.g. a copy in another precision."""
        self._tensors[name] = tensor

    def sources(self, checkpoint: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Find the checkpoint's tensor for every name of the model.

        Raises:
            CheckpointMismatch: Missing or unknown names, other shapes, another kind of numbers, or tied
                weights that differ.
        """
        _refuse("is missing", [" or ".join(g) for g in self._groups if not any(n in checkpoint for n in g)])
        _refuse("has the unknown", sorted(set(checkpoint) - set(self._tensors)))
        found = {name: checkpoint[next(n for n in group if n in checkpoint)]
                 for group in self._groups for name in group}  # fmt: skip
        _refuse(
            "has the wrong shape for",
            [
                f"{name}: {list(tensor.shape)} instead of {list(self._tensors[name].shape)}"
                for name, tensor in found.items()
                if tensor.shape != self._tensors[name].shape
            ],
        )
        kinds = {name: (tensor, self._tensors[name]) for name, tensor in found.items()}
        _refuse(
            "holds numbers of another kind in",
            [
                f"{name}: {tensor.dtype}"
                for name, (tensor, target) in kinds.items()
                if tensor.is_floating_point() != target.is_floating_point() or tensor.element_size() < 2
            ],
        )
        _refuse(
            "holds different values for tied weights:",
            [
                " and ".join(present)
                for present in ([name for name in group if name in checkpoint] for group in self._groups)
                if any(not torch.equal(checkpoint[present[0]], checkpoint[name]) for name in present[1:])
            ],
        )
        return found

    @torch.inference_mode()
    def fill(self, sources: Mapping[str, torch.Tensor]) -> None:
        """Copy what `sources` returned into the model, converting the precision."""
        for name, tensor in sources.items():
            self._tensors[name].copy_(tensor)


def read_checkpoint(directory: Path) -> dict[str, torch.Tensor]:
    """Read all safetensors of a Hugging Face directory into memory.

    Raises:
        CheckpointMismatch: There are none, or a file cannot be read.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in _files(directory):
        try:
            tensors.update(load_file(path))
        except (OSError, SafetensorError) as error:
            raise CheckpointMismatch(f"{path} cannot be read as safetensors: {error}") from error
    return tensors


def _files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise CheckpointMismatch(f"{directory} is not a directory on the inference server's machine")
    if (directory / _SINGLE_FILE).is_file():
        return [directory / _SINGLE_FILE]
    index = directory / _INDEX_FILE
    if not index.is_file():
        raise CheckpointMismatch(f"{directory} holds neither {_SINGLE_FILE} nor {_INDEX_FILE}")
    try:
        shards: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted(set(shards))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointMismatch(f"{index} is not an index of safetensors: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointMismatch(f"{index} names {name!r}, which is not a safetensors file beside it")
    return [directory / name for name in names]


def _refuse(what: str, faults: list[str]) -> None:
    if faults:
        more = len(faults) - _MOST_NAMES_IN_MESSAGE
        listed = "; ".join(faults[:_MOST_NAMES_IN_MESSAGE]) + (f"; and {more} more" if more > 0 else "")
        raise CheckpointMismatch(f"the checkpoint {what} {listed}. The weights served before stay in use.")

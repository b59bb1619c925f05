"""The live model's weights, piece by piece, as the base holds them: its names, its types, its layout.

What is written into a directory and what is sent to a server. Adapters are merged, and an architecture's own
layout (for instance experts that are one tensor in memory and many in the checkpoint) is undone. Nothing is
copied before its turn, and nothing is kept after it.

Data flow: live tensor -> adapter merged -> cast -> checkpoint's layout.

The memory beside the model is one tensor, plus what merging or unfolding the next tensor takes for a moment.
Weights that need neither a cast nor anything else are not copied at all: whoever takes them has to be done
with them before the model changes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import CheckpointError
from trainer.model.base_checkpoint import BaseCheckpoint, StoredTensor
from trainer.model.merged_weight import merged_weight
from trainer.model.sharding import WHOLE, Spread, in_turn
from trainer.model.weight_requests import WeightRequests
from trainer.model.wrappers import (
    adapted_layers,
    plain_name,
    unwrap,
    weights_by_name,
)

_BUCKET_BYTES = 1 << 28


def dtype_name(dtype: torch.dtype) -> str:
    """Return `bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class WeightEntry:
    """Name, shape and type of one weight of the stream."""

    name: str
    """Its name in a checkpoint."""
    dtype: torch.dtype
    """The type in which it travels."""
    shape: tuple[int, ...]

    @property
    def dtype_name(self) -> str:
        """Its type as engines spell it."""
        return dtype_name(self.dtype)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class WeightUnit:
    """Tensors of the model that become checkpoint tensors together; nearly always one and the same."""

    sources: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    """Of the checkpoint's tensors, by name."""
    converted: bool
    """Whether the architecture's layout differs from its checkpoint's here by more than a name."""


class WeightStream:
    """Reads one model's weights, as often as asked, always in the same order.

    Made once; the weights are read when they are asked for. From one thread at a time.

    Args:
        model: A transformers model, possibly inside DistributedDataParallel, torch.compile or PEFT.
        base: What the model was loaded from.
        dtype: Floating-point weights are cast to it, except those that the architecture keeps in float32.
            None: each has the type that it has in the base.
        bucket_bytes: For whoever sends several weights at once: how many bytes.
        spread: How the weights are spread over processes; they are not gathered when it is made.
        requests: Asks the other processes for each weight, where process 0 reads at its own pace (`follow`).
            None: all read at the same time.

    Raises:
        CheckpointError: The weights cannot be read one at a time, cannot be brought into the base's layout,
            or an adapter changes one of several names of a weight.
    """

    def __init__(
        self,
        model: nn.Module,
        base: BaseCheckpoint,
        *,
        dtype: torch.dtype | None = None,
        bucket_bytes: int = _BUCKET_BYTES,
        spread: Spread = WHOLE,
        requests: WeightRequests | None = None,
    ) -> None:
        self.base = base
        self.spread = spread
        self.requests = requests
        self._inner = unwrap(model)
        tensors = base.tensors
        self._units = _fit(self._inner, _plan(self._inner), tensors)
        names = [name for unit in self._units for name in unit.shapes]
        kept = float32_names(self._inner, names, dtype)
        self._entries = {
            name: WeightEntry(
                name, _target(tensors[name], None if name in kept else dtype), tensors[name].shape
            )
            for name in names
        }
        self.bucket_bytes = bucket_bytes

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self._inner.parameters()).device
        return device

    @property
    def total_bytes(self) -> int:
        """Size of everything that travels."""
        return sum(entry.nbytes for entry in self._entries.values())

    @property
    def largest_bytes(self) -> int:
        """Size of the largest single weight."""
        return max(entry.nbytes for entry in self._entries.values())

    @property
    def dtype_name(self) -> str:
        """The type that most of the numbers have."""
        sizes: dict[str, int] = defaultdict(int)
        for entry in self._entries.values():
            sizes[entry.dtype_name] += entry.nbytes
        return max(sizes, key=lambda name: sizes[name])

    @property
    def piecewise(self) -> bool:
        """Whether every weight can be made from those of one layer."""
        return all(len({_layer_of(name) for name in unit.sources}) == 1 for unit in self._units)

    def entries(self) -> list[WeightEntry]:
        """Lists the weights in their order, without touching any data."""
        return list(self._entries.values())

    def weights(self, owners: Mapping[str, int] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield weights with their names, contiguous, on the model's device; none is kept.

        Args:
            owners: Of weights that are spread: which process gets each of them whole. All processes have to
                go through it, and each is given what it owns. None: process 0 owns all.

        Raises:
            CheckpointError: An adapter cannot be merged, or the model is not what it was.
        """
        live = weights_by_name(self._inner)
        adapted = adapted_layers(self._inner)
        asking: Callable[[int], AbstractContextManager[object]] = nullcontext
        if self.requests is not None:
            asking = self.requests.begin()
        for number, (unit, owner) in enumerate(self._turns(owners or {})):
            if not self.spread.sends_to(owner):
                continue
            with asking(number):
                made = self._make(unit, live, adapted, owner)
            made_on = _current_stream(self.device)
            while made:
                name, tensor = made.pop()
                if (owners or {}).get(name, 0) != owner:
                    continue
                _hand_over(tensor, made_on)
                yield name, tensor
                del tensor  # before the next one is made

    def finish(self) -> None:
        """Take part in reading weights that are spread, for whatever use process 0 has."""
        for _ in self.weights():
            pass

    def follow(self) -> None:
        """Send the own part of what process 0 asks for, as often as it does; on the others."""
        if self.requests is None or not self.spread.sends_to(0):
            return
        live, adapted = weights_by_name(self._inner), adapted_layers(self._inner)
        for number in self.requests.heard():
            self._make(self._units[number], live, adapted, 0)

    def _turns(self, owners: Mapping[str, int]) -> list[tuple[WeightUnit, int]]:
        """The units, and who gets each; owners in turn, so that they write at the same time."""
        return in_turn(
            (unit, owner)
            for unit in self._units
            for owner in sorted({owners.get(name, 0) for name in unit.shapes})
        )

    def _make(
        self, unit: WeightUnit, live: Mapping[str, Tensor], adapted: Mapping[str, Any], owner: int
    ) -> list[tuple[str, Tensor]]:
        """The unit's weights on their owner, the first one last; nothing on other processes."""
        with torch.no_grad():
            tensors, dtype = {}, self._common_dtype(unit)
            for name in unit.sources:
                whole = self.spread.whole_on(self._read(name, live, adapted), owner, dtype)
                if whole is not None:
                    tensors[name] = whole
            return self.complete(unit, tensors) if tensors else []

    def pieces(self) -> Iterator[tuple[WeightUnit, Iterator[tuple[str, Tensor]]]]:
        """Yield the units with the tensors that they are made of, merged and cast; nothing is gathered."""
        live, adapted = weights_by_name(self._inner), adapted_layers(self._inner)
        for unit in self._units:
            yield unit, self._sources(unit, live, adapted)

    def live(self) -> Iterator[tuple[WeightUnit, Tensor]]:
        """Yield the units with the first tensor of each as the model has it, without adapters."""
        live = weights_by_name(self._inner)
        for unit in self._units:
            yield unit, live[unit.sources[0]]

    def _sources(
        self, unit: WeightUnit, live: Mapping[str, Tensor], adapted: Mapping[str, Any]
    ) -> Iterator[tuple[str, Tensor]]:
        """The unit's tensors as the model has them, merged, and cast where that takes less to convert."""
        dtype = self._common_dtype(unit)
        for name in unit.sources:
            tensor = self._read(name, live, adapted)
            yield name, tensor if dtype is None else tensor.to(dtype)

    def _common_dtype(self, unit: WeightUnit) -> torch.dtype | None:
        """The type of all of the unit's weights; None where they have several."""
        kinds = {self._entries[name].dtype for name in unit.shapes}
        return kinds.pop() if len(kinds) == 1 else None

    def complete(self, unit: WeightUnit, tensors: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        """The unit's weights of its whole tensors, the first one last."""
        entries = [self._entries[name] for name in reversed(unit.shapes)]
        with torch.no_grad():
            if unit.converted:
                tensors = _in_checkpoint_layout(self._inner, tensors)
            else:
                tensors = {entry.name: tensors[unit.sources[0]] for entry in entries}
            made = [(entry.name, tensors[entry.name].to(entry.dtype).contiguous()) for entry in entries]
        for (name, tensor), entry in zip(made, entries, strict=True):
            if tuple(tensor.shape) != entry.shape:
                raise CheckpointError(
                    f"{name} has shape {list(tensor.shape)}, and had {list(entry.shape)} at the start; "
                    "the model's layers must not be exchanged during a run"
                )
        return made

    def _read(self, name: str, live: Mapping[str, Tensor], adapted: Mapping[str, Any]) -> Tensor:
        return (merged_weight(name, adapted[name]) if name in adapted else live[name]).detach()


def stored_names(model: nn.Module, base: BaseCheckpoint) -> dict[str, str]:
    """Return under which name the base holds each of a model's tensors; what it does not store is left out.

    Args:
        model: Without adapters; values are not needed.
        base: What it is loaded from.

    Raises:
        CheckpointError: They differ by more than names (experts that are one tensor in memory and many in the
            checkpoint).
    """
    inner = unwrap(model)
    units = _fit(inner, _plan(inner), base.tensors)
    for unit in units:
        if unit.converted or len(unit.shapes) > 1:
            raise CheckpointError(f"{unit.sources[0]} has another layout in its file than in memory")
    return {unit.sources[0]: name for unit in units for name in unit.shapes}


def _target(stored: StoredTensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and stored.dtype.is_floating_point else stored.dtype


def float32_names(inner: Any, names: Iterable[str], dtype: torch.dtype | None) -> set[str]:
    """Weights that the architecture keeps in float32 because half precision ruins them."""
    if dtype not in (torch.bfloat16, torch.float16):
        return set()
    patterns = set(getattr(inner, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        patterns |= set(getattr(inner, "_keep_in_fp32_modules", None) or ())
    return {name for name in names if any(pattern in name.split(".") for pattern in patterns)}


def _shared_names(inner: nn.Module) -> dict[str, frozenset[str]]:
    """Names of parameters, each with all the names that the same parameter has.

    Raises:
        CheckpointError: An adapter changes what one of several names stands for.
    """
    by_identity: dict[int, set[str]] = defaultdict(set)
    for name, tensor in inner.named_parameters(remove_duplicate=False):
        by_identity[id(tensor)].add(plain_name(name))
    adapted = adapted_layers(inner)
    for names in by_identity.values():
        if len(names) > 1 and (found := sorted(names & adapted.keys())):
            raise CheckpointError(
                f"{' and '.join(sorted(names))} are tied, so an adapter of {found[0]} could not be merged "
                "into the one weight that the base has; leave them out of model.lora.target_modules"
            )
    return {name: frozenset(names) for names in by_identity.values() for name in names}


def _fit(inner: Any, units: list[WeightUnit], stored: Mapping[str, StoredTensor]) -> list[WeightUnit]:
    """Keep the units that the base has, under its names; of a tied weight it may have one name or all.

    Raises:
        CheckpointError: The base lacks a weight, or has it in another shape.
    """
    shared, model = _shared_names(inner), type(inner).__name__
    units = [_without_prefix(unit, f"{inner.base_model_prefix}.", stored) for unit in units]
    present = [unit for unit in units if unit.shapes.keys() & stored.keys()]
    held = {source for unit in present for source in unit.sources}
    for unit in units:
        missing = [name for name in unit.shapes if name not in stored]
        # Buffers that are not stored are computed, or constant.
        optional = all(name not in shared or shared[name] & held for name in unit.sources)
        if missing and (unit in present or not optional):
            raise CheckpointError(
                f"the base has no weight {missing[0]!r}, which {model} has, so what is trained could not be "
                "written as the base is; use a base in the layout that transformers loads without conversion "
                "(or, with LoRA, name modules in model.lora.target_modules that it has: q_proj,v_proj)"
            )
        for name in unit.shapes.keys() & stored.keys():
            if unit.shapes[name] != stored[name].shape:
                raise CheckpointError(
                    f"{name} has shape {list(stored[name].shape)} in the base and "
                    f"{list(unit.shapes[name])} in {model}"
                )
    return present


def _without_prefix(unit: WeightUnit, prefix: str, stored: Mapping[str, StoredTensor]) -> WeightUnit:
    """Drop the prefix that bases saved without a head lack; transformers adds it while it loads them."""
    if unit.converted or unit.shapes.keys() & stored.keys():
        return unit
    shapes = {name.removeprefix(prefix): shape for name, shape in unit.shapes.items()}
    return replace(unit, shapes=shapes) if shapes.keys() <= stored.keys() else unit


def _plan(inner: Any) -> list[WeightUnit]:
    """Find the smallest pieces that can be brought into the checkpoint's layout on their own.

    Tried on tensors without data: what the pieces give has to be what the whole model gives. A tensor that
    comes out as the same object is only renamed.
    """
    own = weights_by_name(inner)
    empty = {name: torch.empty(tensor.shape, device="meta") for name, tensor in own.items()}
    whole = _in_checkpoint_layout(inner, empty)
    new_names = {id(tensor): name for name, tensor in whole.items()}
    renamed = {name: new_names.pop(id(tensor)) for name, tensor in empty.items() if id(tensor) in new_names}
    units = [WeightUnit((name,), {new: tuple(empty[name].shape)}, False) for name, new in renamed.items()]
    converted = {name: tensor for name, tensor in empty.items() if name not in renamed}
    if converted:
        units += _plan_conversions(
            inner, converted, _shapes({name: whole[name] for name in new_names.values()})
        )
    order = {name: number for number, name in enumerate(empty)}
    return sorted(units, key=lambda unit: order[unit.sources[0]])


def _plan_conversions(
    inner: Any, empty: Mapping[str, Tensor], whole: dict[str, tuple[int, ...]]
) -> list[WeightUnit]:
    for key in (lambda name: name), _layer_of:
        units = _try_conversions(inner, empty, key)
        if {name: shape for unit in units for name, shape in unit.shapes.items()} == whole:
            return units
    return [WeightUnit(tuple(empty), whole, True)]


def _try_conversions(inner: Any, empty: Mapping[str, Tensor], key: Callable[[str], str]) -> list[WeightUnit]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in empty:
        groups[key(name)].append(name)
    units = []
    for names in groups.values():
        try:
            made = _in_checkpoint_layout(inner, {name: empty[name] for name in names})
        except Exception:  # noqa: BLE001 - whatever a converter says to a part of what it needs: not this way
            return []
        units.append(WeightUnit(tuple(names), _shapes(made), True))
    return units


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _in_checkpoint_layout(inner: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo what transformers does to a checkpoint's tensors while it loads them."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4
        if getattr(inner, "_checkpoint_conversion_mapping", None):
            raise CheckpointError(
                f"the checkpoint names of {type(inner).__name__} are not the model's own, which this version "
                "of transformers does not undo; install transformers 5"
            ) from None
        return dict(tensors)
    return dict(revert_weight_conversion(inner, dict(tensors)))


def _layer_of(name: str) -> str:
    """Everything up to the first number: `model.layers.3`."""
    match = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", name)
    return match.group() if match else ""


def _current_stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _hand_over(tensor: Tensor, made_on: Any) -> None:
    """Order the reader's stream after the one that made the tensor; senders alternate between several."""
    if made_on is None:
        return
    reader = torch.cuda.current_stream(tensor.device)
    if reader != made_on:
        reader.wait_stream(made_on)
        tensor.record_stream(reader)

"""The live model's weights, piece by piece, as a Hugging Face checkpoint would hold them.

What transports send that never write a directory. Names, ties, merged adapters, types and an architecture's
own layout (for instance experts that are one tensor in memory and many in the checkpoint) are those of
`trainer.model_directory`; only that nothing is copied before its turn, and nothing is kept after it.

Data flow: live tensor -> gathered (DTensor) -> adapter merged -> cast -> checkpoint's layout -> bucket.

The memory beside the model is one bucket, plus what merging or unfolding the next tensor takes for a moment.
Weights that need neither a cast nor anything else are not copied at all: whoever takes them has to be done
with them before the model changes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import CheckpointError
from trainer.model_directory import checkpoint_names, float32_names, merged_weight, unwrap


@dataclass(frozen=True)
class WeightEntry:
    """What one weight of the stream will look like."""

    name: str
    """Its name in a checkpoint."""
    dtype: torch.dtype
    """The type in which it travels."""
    shape: tuple[int, ...]
    """Its whole shape, whatever shards the trainer holds."""

    @property
    def dtype_name(self) -> str:
        """`bfloat16` for `torch.bfloat16`: how engines spell it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class _Unit:
    """Tensors of the model that become checkpoint tensors together; nearly always one and the same."""

    sources: tuple[str, ...]
    entries: tuple[WeightEntry, ...]
    converted: bool
    """Whether the architecture's layout differs from its checkpoint's here."""


class WeightStream:
    """Reads one model's weights, as often as asked, always in the same order.

    Made once; the weights are read when they are asked for. From one thread at a time.

    Args:
        model: A transformers model, possibly inside DistributedDataParallel, torch.compile or PEFT, or
            sharded by `fully_shard`.
        dtype: Floating-point weights are cast to it, except those that the architecture keeps in float32.
            None: as they are.
        bucket_bytes: Size of a bucket; a single larger weight is a bucket of its own.

    Raises:
        CheckpointError: The weights cannot be had one at a time: they are flattened, or the checkpoint's
            layout mixes layers.
    """

    def __init__(self, model: nn.Module, *, dtype: torch.dtype | None, bucket_bytes: int) -> None:
        _refuse_flattened(model)
        self._inner = unwrap(model)
        self._dtypes = _served_dtypes(self._inner, dtype)
        self._units = _plan(self._inner, self._dtypes)
        self._entries = [entry for unit in self._units for entry in unit.entries]
        self._bucket_bytes = bucket_bytes

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self._inner.parameters()).device
        return device

    @property
    def total_bytes(self) -> int:
        """Size of everything that travels."""
        return sum(entry.nbytes for entry in self._entries)

    @property
    def largest_bytes(self) -> int:
        """Size of the largest single weight."""
        return max(entry.nbytes for entry in self._entries)

    @property
    def bucket_bytes(self) -> int:
        """Size of a bucket."""
        return self._bucket_bytes

    @property
    def dtype_name(self) -> str:
        """The type that most of the numbers have."""
        sizes: dict[str, int] = defaultdict(int)
        for entry in self._entries:
            sizes[entry.dtype_name] += entry.nbytes
        return max(sizes, key=lambda name: sizes[name])

    def entries(self) -> list[WeightEntry]:
        """What the weights will be, in their order, without touching any data."""
        return list(self._entries)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight with its name, contiguous, on the model's device; none is kept.

        With weights in shards this is a collective: all processes have to iterate (`take_part`).

        Raises:
            CheckpointError: An adapter cannot be merged, or the model is not what it was.
        """
        live = checkpoint_names(self._inner)
        adapted = _adapted_layers(self._inner)
        for unit in self._units:
            made = self._make(unit, live, adapted)
            made_on = _current_stream(self.device)
            while made:
                name, tensor = made.pop()
                _hand_over(tensor, made_on)
                yield name, tensor
                del tensor  # before the next one is made

    def buckets(self) -> Iterator[list[tuple[str, Tensor]]]:
        """Yield the weights in lists of at most `bucket_bytes`.

        A list is emptied when the next one is asked for, so that a caller's variable keeps nothing alive.
        """
        weights = self.weights()
        for count in self._bucket_counts():
            bucket = list(islice(weights, count))
            yield bucket
            bucket.clear()

    def take_part(self) -> None:
        """Join the gathering of sharded weights on a process that does not send."""
        for _ in self.weights():
            pass

    def _bucket_counts(self) -> Iterator[int]:
        count = size = 0
        for entry in self._entries:
            if count and size + entry.nbytes > self._bucket_bytes:
                yield count
                count = size = 0
            count += 1
            size += entry.nbytes
        if count:
            yield count

    def _make(
        self, unit: _Unit, live: Mapping[str, Tensor], adapted: Mapping[str, Any]
    ) -> list[tuple[str, Tensor]]:
        """The unit's weights, the first one last."""
        with torch.no_grad():
            tensors = {name: self._cast(name, live, adapted) for name in unit.sources}
            if unit.converted:
                tensors = _in_checkpoint_layout(self._inner, tensors)
            made = [(entry.name, tensors[entry.name].contiguous()) for entry in reversed(unit.entries)]
        for (name, tensor), entry in zip(made, reversed(unit.entries), strict=True):
            if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                raise CheckpointError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)}, and was {entry.dtype} "
                    f"{list(entry.shape)} at the start; the model's layers must not be exchanged during a run"
                )
        return made

    def _cast(self, name: str, live: Mapping[str, Tensor], adapted: Mapping[str, Any]) -> Tensor:
        tensor = merged_weight(name, adapted[name]) if name in adapted else live[name]
        if hasattr(tensor, "full_tensor"):  # a DTensor: this process holds a shard
            tensor = tensor.full_tensor()
        return tensor.detach().to(self._dtypes[name])


def _refuse_flattened(model: nn.Module) -> None:
    """Some wrappers replace the weights by flat shards, which have no names and no shapes to send."""
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise CheckpointError(
                "FullyShardedDataParallel flattens the weights, so they cannot be sent from the live model; "
                "use fully_shard (FSDP 2), or publish.transport disk"
            )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise CheckpointError(
            "DeepSpeed ZeRO 3 keeps the weights in partitions, so they cannot be sent from the live model; "
            "use publish.transport disk"
        )


def _served_dtypes(inner: Any, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """The model's names for what a checkpoint holds, in order, tied weights once; each with its type."""
    own = checkpoint_names(inner)
    dropped = _tied_copies(inner, own) | set(getattr(inner, "_keys_to_ignore_on_save", None) or ())
    kept = float32_names(inner, own, dtype)
    return {
        name: tensor.dtype if dtype is None or name in kept or not tensor.is_floating_point() else dtype
        for name, tensor in own.items()
        if name not in dropped
    }


def _tied_copies(inner: Any, own: Collection[str]) -> set[str]:
    """The names that a checkpoint leaves out because another name holds the same weight."""
    by_identity: dict[int, list[str]] = defaultdict(list)
    tensors: Iterable[tuple[str, Tensor]] = chain(
        inner.named_parameters(remove_duplicate=False), inner.named_buffers(remove_duplicate=False)
    )
    for name, tensor in tensors:
        if (plain := name.replace(".base_layer.", ".")) in own:
            by_identity[id(tensor)].append(plain)
    adapted = _adapted_layers(inner)
    patterns = _tie_patterns(inner)
    copies: set[str] = set()
    for names in by_identity.values():
        if 0 < sum(name in adapted for name in names) < len(names):
            raise CheckpointError(
                f"{' and '.join(names)} are tied in the model but not adapted alike; "
                "leave them out of the adapter's target modules"
            )
        known = [name for name in sorted(names) if any(re.search(pattern, name) for pattern in patterns)]
        copies.update(known[: len(names) - 1])
    return copies


def _tie_patterns(inner: Any) -> list[str]:
    """The names (regular expressions) that the architecture declares as copies of others."""
    patterns: list[str] = []
    for prefix, module in inner.named_modules():
        keys = getattr(module, "_tied_weights_keys", None) or ()
        patterns += [f"{re.escape(prefix)}\\..*{key}" if prefix else key for key in keys]
    return patterns


def _adapted_layers(inner: nn.Module) -> dict[str, Any]:
    """PEFT's layers, by the checkpoint's name of the weight that they adapt."""
    return {
        f"{name}.weight": module
        for name, module in inner.named_modules()
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer")
    }


def _plan(inner: Any, dtypes: Mapping[str, torch.dtype]) -> list[_Unit]:
    """Find the smallest pieces that can be brought into the checkpoint's layout on their own.

    Tried on tensors without data: what the pieces give has to be what the whole model gives.
    """
    own = checkpoint_names(inner)
    empty = {name: torch.empty(own[name].shape, dtype=dtype, device="meta") for name, dtype in dtypes.items()}
    whole = _described(_in_checkpoint_layout(inner, empty))
    if whole == _described(empty):
        return [_Unit((name,), tuple(_entries({name: tensor})), False) for name, tensor in empty.items()]
    for key in (lambda name: name), _layer_of:
        units = _try_plan(inner, empty, key)
        if units is not None and {entry for unit in units for entry in unit.entries} == whole:
            return units
    raise CheckpointError(
        f"the checkpoint layout of {type(inner).__name__} mixes weights of several layers, so it cannot be "
        "sent piece by piece; use publish.transport disk"
    )


def _try_plan(inner: Any, empty: Mapping[str, Tensor], key: Callable[[str], str]) -> list[_Unit] | None:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in empty:
        groups[key(name)].append(name)
    units = []
    for names in groups.values():
        given = {name: empty[name] for name in names}
        try:
            made = _in_checkpoint_layout(inner, given)
        except Exception:  # noqa: BLE001 - whatever a converter says to a part of what it needs: not this way
            return None
        units.append(_Unit(tuple(names), tuple(_entries(made)), _described(made) != _described(given)))
    return units


def _in_checkpoint_layout(inner: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo what transformers does to a checkpoint's tensors while it loads them."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4
        if getattr(inner, "_checkpoint_conversion_mapping", None):
            raise CheckpointError(
                f"the checkpoint names of {type(inner).__name__} are not the model's own, which this version "
                "of transformers can only undo for whole models; install transformers 5, or use "
                "publish.transport disk"
            ) from None
        return dict(tensors)
    return dict(revert_weight_conversion(inner, dict(tensors)))


def _layer_of(name: str) -> str:
    """Everything up to the first number: `model.layers.3`."""
    match = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", name)
    return match.group() if match else ""


def _entries(tensors: Mapping[str, Tensor]) -> Iterator[WeightEntry]:
    for name, tensor in tensors.items():
        yield WeightEntry(name, tensor.dtype, tuple(tensor.shape))


def _described(tensors: Mapping[str, Tensor]) -> set[WeightEntry]:
    return set(_entries(tensors))


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

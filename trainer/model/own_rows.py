"""Builds a model without its weights, and reads of each of them only the rows that this process holds.

What is decided by weights (packing, head, who is trained) is decided on the model's first layers, which
are loaded whole with embedding, norm and head, and let go before the rows are read.

Data flow: headers of the files, compared with the model -> model without values, and its first layers ->
decisions -> model spread over the processes, still without values -> own rows from the files.
"""

from __future__ import annotations

import copy
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.errors import CheckpointError, ConfigurationError
from trainer.model.base_checkpoint import BaseCheckpoint, WeightFile, read_base
from trainer.model.pretrained import LOADING_ERRORS, load_model, load_structure
from trainer.model.sharding import Spread
from trainer.model.weight_stream import float32_names, stored_names
from trainer.model.wrappers import is_adapter, plain_name, unwrap, weights_by_name

logger = logging.getLogger(__name__)

_PIECE_BYTES: Final = 1 << 24
"""Read at a time; a multiple of the size of every type."""


@dataclass(frozen=True, kw_only=True)
class StoredRows:
    """Where the weights of a model without values are."""

    files: Mapping[str, WeightFile]
    """By the name of each tensor that the model has, without what adapters put into it."""
    names: Mapping[str, str]
    """Its name in the file, by the same."""

    def read_into(self, model: nn.Module, spread: Spread, device: torch.device) -> str | None:
        """Give a model that is spread over processes its own rows.

        Args:
            model: Spread, and not yet called; what has values, adapters and buffers that are computed,
                keeps them.
            spread: How it is spread.
            device: Where it is to be.

        Returns:
            What is wrong with this process's rows; None: nothing.

        Raises:
            ConfigurationError: The model has weights that are not stored, which is so on every process.
        """
        kind = type(unwrap(model)).__name__
        for name, tensor in _tensors(unwrap(model)):
            if tensor.is_meta and plain_name(name) not in self.names:
                raise ConfigurationError(f"{kind}: {name} has no values, and no file has them")
        if spread.sharded:
            _make_room(model, device)
        else:  # tied weights stay one
            _replace_parameters(
                model, lambda each: each.is_meta, lambda each: torch.empty_like(each, device=device)
            )
            model.to(device)
        reason = None
        with torch.no_grad():
            try:
                finite = self._fill(unwrap(model), spread)
            except OSError as error:
                reason = f"its weights cannot be read: {error}"
            else:
                reason = None if finite else "its weights hold NaN or infinities"
        return reason

    def whole(self, name: str) -> Tensor:
        """Return one tensor whole, float32 where it holds floating-point numbers, on the CPU.

        Raises:
            OSError: It cannot be read.
        """
        stored = self.files[name].tensors[self.names[name]]
        whole = torch.empty(
            stored.shape, dtype=torch.float32 if stored.dtype.is_floating_point else stored.dtype
        )
        self._read(name, 0, whole)
        return whole

    def _fill(self, inner: nn.Module, spread: Spread) -> bool:
        """Read all that is stored; returns whether all of it are numbers."""
        finite = True
        for given, tensor in _tensors(inner):
            name = plain_name(given)
            if name in self.names:
                first, _ = spread.own_rows(tensor)
                own = tensor.detach()
                finite &= self._read(name, first, own.to_local() if hasattr(own, "to_local") else own)
        return finite

    def _read(self, name: str, first: int, into: Tensor) -> bool:
        """Read as many rows as `into` has, from row `first` on; returns whether they are numbers."""
        file, stored = self.files[name], self.files[name].tensors[self.names[name]]
        row = torch.Size(stored.shape[1:]).numel()
        offset = file.starts[self.names[name]] + first * row * stored.dtype.itemsize
        numbers, finite = into.view(-1), True
        size = _PIECE_BYTES // stored.dtype.itemsize
        for begin in range(0, len(numbers), size):
            part = numbers[begin : begin + size]
            piece = torch.empty(len(part) * stored.dtype.itemsize, dtype=torch.uint8)
            _read_bytes(file.descriptor, piece, offset + begin * stored.dtype.itemsize, name)
            part.copy_(piece.view(stored.dtype))
            finite &= bool(torch.isfinite(part).all())
        return finite


def _make_room(model: nn.Module, device: torch.device) -> None:
    """Give tensors without values memory; the others keep theirs, on the device."""
    values = {name: tensor.detach().clone() for name, tensor in _tensors(model) if not tensor.is_meta}
    model.to_empty(device=device)
    with torch.no_grad():
        for name, tensor in _tensors(model):
            if name in values:
                tensor.copy_(values[name])


@dataclass(kw_only=True)
class LoadedModel:
    """A model with its weights, or one whose weights are read when it has been spread over processes."""

    model: Any
    """Unread, its parameters have no values; buffers have those that transformers computes."""
    first_layers: Any | None = None
    """Unread: the same with fewer layers, and with their weights."""
    rows: StoredRows | None = None
    """Unread: where the weights are."""

    @property
    def tested(self) -> nn.Module:
        """Stands for the model where its weights decide: the model itself, or its first layers."""
        tested: nn.Module = self.model if self.first_layers is None else self.first_layers
        return tested

    @property
    def both(self) -> list[nn.Module]:
        """The model and its first layers, where they are not the same."""
        return [self.model] if self.first_layers is None else [self.model, self.first_layers]

    @contextmanager
    def filled(self) -> Iterator[None]:
        """Within it an unread model's parameters lie on the CPU, each with one number that takes no memory.

        For adapters, which are put where the weights are that they adapt.
        """
        inner: nn.Module = self.model
        fillers = _replace_parameters(
            inner, lambda each: each.is_meta, lambda each: torch.zeros(1, dtype=each.dtype).expand(each.shape)
        )
        numbers = {id(each) for each in fillers}
        yield
        _replace_parameters(
            inner,
            lambda each: id(each) in numbers,
            lambda each: torch.empty(each.shape, dtype=each.dtype, device="meta"),
        )

    def spread_over(self, spread: Spread, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Spread the model, and read its rows if it is unread. Every process has to call it.

        Args:
            spread: How.
            device: Where it is to be.
            dtype: Of its weights from here on. Adapters stay float32, and so does what the architecture keeps
                so.

        Raises:
            ConfigurationError: See `Spread.shard`; or a process cannot read its rows, or has some that are no
                numbers.
        """
        if self.first_layers is not None:
            _take_over(self.model, self.first_layers)
            self.first_layers = None  # its memory is for the rows
        if dtype != torch.float32:
            _cast(self.model, dtype)
        spread.shard(self.model)
        wrong = None if self.rows is None else self.rows.read_into(self.model, spread, device)
        self.rows = None
        if spread.any(wrong is not None):
            wrong = wrong or "another process cannot read its rows, or they are no numbers"
            raise ConfigurationError(f"{type(unwrap(self.model)).__name__} cannot be trained: {wrong}")


def load(
    path: str,
    *,
    trust_remote_code: bool,
    attention: str | None,
    setting: str = "model.path",
    rows_only: bool = False,
) -> LoadedModel:
    """Load a model as `load_model` does, or leave its weights unread.

    Args:
        path: Directory, or hub id.
        trust_remote_code: Whether code beside the weights may run.
        attention: See `load_model`.
        setting: See `load_model`.
        rows_only: Leave them unread. Of a hub id, and of weights that transformers converts while it loads
            them, the whole is loaded, and the log says why.

    Raises:
        ConfigurationError, OSError, ValueError, ...: See `load_model`.
    """
    if rows_only:
        structure = load_structure(path, trust_remote_code=trust_remote_code, setting=setting)
        try:
            with torch.random.fork_rng(devices=[]):  # building draws numbers, which loading does not
                return _prepare(path, structure, trust_remote_code, attention, setting)
        except (*LOADING_ERRORS, ConfigurationError, CheckpointError, AttributeError, TypeError) as error:
            logger.warning(
                "Each process loads the whole of %s before it keeps its rows, because %s", path, error
            )
    return LoadedModel(
        model=load_model(path, trust_remote_code=trust_remote_code, attention=attention, setting=setting)
    )


def _prepare(
    path: str, structure: Any | None, trust_remote_code: bool, attention: str | None, setting: str
) -> LoadedModel:
    """Build a model without weights, and load its first layers.

    Raises:
        ValueError, CheckpointError, ...: Its rows cannot be read one process at a time.
    """
    if structure is None:
        raise ValueError("rows are read from a directory only, and not from quantized weights")
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    model = _without_weights(config, trust_remote_code, attention)
    if weights_by_name(model).keys() != weights_by_name(structure).keys():
        raise ValueError("it has other tensors when it is built than when it is loaded")
    if unset := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise ValueError(f"its buffer {unset[0]} is not computed when it is built")
    rows = _find_rows(model, read_base(path, trust_remote_code=trust_remote_code))
    with _quiet_transformers():
        first_layers = load_model(
            path,
            trust_remote_code=trust_remote_code,
            attention=attention,
            setting=setting,
            first_layers=_layers_of_every_kind(config),
        )
    return LoadedModel(model=model, first_layers=first_layers, rows=rows)


def _take_over(model: nn.Module, first_layers: nn.Module) -> None:
    """Give a model what was decided on its first layers: the attention, and which parameters are trained."""
    ours, theirs = unwrap(model), unwrap(first_layers)
    if ours.config._attn_implementation != theirs.config._attn_implementation:
        ours.set_attn_implementation(theirs.config._attn_implementation)
    frozen = {name for name, each in first_layers.named_parameters() if not each.requires_grad}
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the weights of the model, not those of adapters or buffers, another type."""
    inner = unwrap(model)
    own = {name: each for name, each in inner.named_parameters() if not is_adapter(name)}
    kept = float32_names(inner, own, dtype)
    for name, parameter in own.items():
        if name not in kept and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _without_weights(config: Any, trust_remote_code: bool, attention: str | None) -> Any:
    """Build the model as transformers does, each parameter without values as soon as it is there."""
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(
            copy.deepcopy(config),
            dtype=torch.float32,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
        )
    model.tie_weights()
    return model.eval()  # as from_pretrained leaves it


def _find_rows(model: Any, base: BaseCheckpoint) -> StoredRows:
    """Find where each tensor is stored.

    Raises:
        ValueError: Its rows are not rows of a stored tensor, or it is not known of which.
        CheckpointError: See `stored_names`.
    """
    names = stored_names(model, base)
    files = {name: file for file in base.weight_files.values() for name in file.tensors}
    by_identity: dict[int, list[str]] = defaultdict(list)
    for name, tensor in chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    ):
        by_identity[id(tensor)].append(name)
    for tied in by_identity.values():
        held = [name for name in tied if name in names]
        if len(held) > 1:
            raise ValueError(f"{' and '.join(held)} are one weight, and both are stored")
        names |= {name: names[held[0]] for name in tied if held}
    for name, tensor in model.named_parameters():
        if name not in names:
            raise ValueError(f"{name} is not stored")
        if tensor.dim() == 0:
            raise ValueError(f"{name} has no rows")
    return StoredRows(files={name: files[stored] for name, stored in names.items()}, names=names)


def _layers_of_every_kind(config: Any) -> int:
    """The least number of first layers among which are all kinds of attention, and two at least."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or []
    firsts = [kinds.index(kind) for kind in set(kinds)]
    return min(max([2, *(first + 1 for first in firsts)]), int(text.num_hidden_layers))


def _replace_parameters(
    model: nn.Module, which: Callable[[nn.Parameter], bool], make: Callable[[nn.Parameter], Tensor]
) -> list[nn.Parameter]:
    """Put others in place of some parameters, tied ones once; returns the others."""
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if not which(old):
                continue
            if id(old) not in made:
                made[id(old)] = (old, nn.Parameter(make(old), requires_grad=old.requires_grad))
            setattr(module, name, made[id(old)][1])
    return [new for _, new in made.values()]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _read_bytes(descriptor: int, into: Tensor, offset: int, name: str) -> None:
    buffer, done = memoryview(into.numpy().data), 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not count:
            raise OSError(f"{name} was cut off while it was read")
        done += count


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Layers that are left out are no news."""
    theirs = logging.getLogger("transformers")
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        theirs.setLevel(level)

"""The one place that knows how weights are spread over processes: whole on each, or a part on each.

Parts are those of torch's FSDP2 (`fully_shard`): of each parameter every process holds some rows, and a layer
is gathered when it is computed. The rest of the trainer asks here to have a model sharded, and for own rows
and whole tensors; with one process, or a copy on each, all of that is trivial.

Layout: each layer is gathered by itself. The final norm and the head are one group that stays gathered from
its forward to its backward pass, because the head's weight is used beside its module (see
`trainer.model.lm_head`); a tied embedding belongs to that group. What is left is the root's.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate

from trainer.config import ParallelSettings
from trainer.errors import ConfigurationError
from trainer.model.collectives import wait
from trainer.model.sequence_parallel import SequenceGroup, make_sequence_group
from trainer.model.wrappers import unwrap

T = TypeVar("T")

_COPIES, _PARTS = "replicate", "shard"

_CONTROL_TIMEOUT: Final = timedelta(hours=2)
"""One process may write for long while the others wait for it."""

GATHERED_BYTES: Final = 8 << 20
"""So much of a tensor is cast and gathered at once, of all processes together; gloo makes a copy of it."""


@dataclass(frozen=True)
class OwnCopy:
    """A copy of what one process holds of a tensor."""

    own: Tensor
    """On the CPU."""
    shape: torch.Size
    """Of the tensor."""
    is_part: bool
    """Whether each process holds some rows; else process 0 has copied all of it."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Number of copies of the weights, of processes that each is spread over, and our place."""

    copies: int = 1
    """Copies of the weights, all the same after every step."""
    parts: int = 1
    """Processes that share one copy. 1: each holds whole weights."""
    gathered: bool = False
    """Layers stay gathered within a step."""
    rank: int = 0
    """This process among all."""
    mesh: DeviceMesh | None = None
    """Of [copies, parts]; None: whole weights."""
    control: Any = None
    """Group for what processes tell each other about weights, by the CPU; nothing else uses it."""
    background: Any = None
    """Group of those that share the first copy, by the CPU, for one thread in each that sends weights."""
    sequence: SequenceGroup | None = None
    """The processes that compute our micro-batches with us. None: each computes its own."""

    @property
    def sharded(self) -> bool:
        """Whether processes hold parts."""
        return self.mesh is not None

    @property
    def part(self) -> int:
        """Which part of its copy this process holds; 0 where it holds all."""
        return self.rank % self.parts

    @property
    def processes(self) -> int:
        """Processes that train together."""
        return self.copies * self.parts

    @property
    def teams(self) -> int:
        """Number of micro-batches computed at a time."""
        return self.processes // self._team_size

    def team_of(self, rank: int) -> int:
        """Which of them a process computes; neighbours by rank compute the same."""
        return rank // self._team_size

    @property
    def leads_team(self) -> bool:
        """Whether this process speaks for its team, whose processes all know the same of a micro-batch."""
        return self.rank % self._team_size == 0

    @property
    def in_lock_step(self) -> bool:
        """Whether processes wait for each other in every micro-batch: where its weights are gathered."""
        return self.sharded and not self.gathered

    @property
    def _team_size(self) -> int:
        return self.sequence.size if self.sequence is not None else 1

    def shard(self, model: nn.Module) -> None:
        """Spread a model in place; what is decided by its whole weights has to be decided before.

        Its parameters become others, of which each process holds some rows: the optimizer is made after it.

        Args:
            model: On its device, as it will be called, not yet wrapped by Accelerate.

        Raises:
            ConfigurationError: The model does not say which of its modules are layers.
        """
        if self.mesh is None:
            return
        inner = unwrap(model)
        layers = _layers(inner)
        if not layers:
            raise ConfigurationError(
                f"parallel.mode: {type(inner).__name__} does not say which of its modules are layers, so it "
                "cannot be gathered layer by layer; set parallel.mode to replicated"
            )
        mesh = self.mesh if self.copies > 1 else self.mesh[_PARTS]
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=not self.gathered)
        embedding, ends = _ends(inner, layers)
        if embedding is not None:
            fully_shard(embedding, mesh=mesh, reshard_after_forward=not self.gathered)
        if ends:
            fully_shard(ends if len(ends) > 1 else ends[0], mesh=mesh, reshard_after_forward=False)
        root: Any = fully_shard(model, mesh=mesh, reshard_after_forward=False)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # Gradients are shares of a sum, so nothing is divided.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        root.set_reduce_scatter_unused_params(True)  # experts that no token was sent to on this process

    def settle(self, model: nn.Module) -> None:
        """Let go of gathered weights and of unfinished gradients: `parameters()` are parts again.

        After every pass that no backward pass follows. All that was gathered is out of date after the next
        optimizer step, and would be computed with.
        """
        if self.mesh is None:
            return
        model.zero_grad(set_to_none=True)  # those of gathered weights
        for module in model.modules():  # the root alone is not enough
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextlib.contextmanager
    def micro_batch(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Within it one micro-batch of a step is computed, forward and backward.

        Sharded, gradients are summed over the processes of a copy after each micro-batch, so that no process
        ever holds all of them; over the copies, after the last. Gathered, all of it after the last.
        """
        if self.mesh is not None:
            root: Any = model
            if self.gathered:
                root.set_requires_gradient_sync(last)
                root.set_reshard_after_backward(last)
            else:
                root.set_requires_all_reduce(last)
        yield

    def own_rows(self, parameter: Tensor) -> tuple[int, int]:
        """Return the first row of a parameter that this process holds, and the one past its last."""
        rows = parameter.shape[0]
        if not isinstance(parameter, DTensor):
            return 0, rows
        size = -(-rows // self.parts)
        first = min(size * self.part, rows)
        return first, min(first + size, rows)

    def as_part(self, own: Tensor, parameter: Tensor, *, rows: int | None = None) -> Tensor:
        """Return own rows as a part of a tensor that is spread as the parameter is.

        Args:
            own: The rows.
            parameter: Whose rows are divided over the processes.
            rows: All rows, where they are fewer than the parameter's: as many of its rows go with each. None:
                the parameter's.
        """
        if not isinstance(parameter, DTensor):
            return own
        shape = torch.Size([parameter.shape[0] if rows is None else rows, *own.shape[1:]])
        part: Tensor = DTensor.from_local(
            own.to(parameter.device),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )
        return part

    def owners(self, sizes: Mapping[str, int], *, last_first: bool = False) -> dict[str, int]:
        """Divide things of some size over the processes: the largest first, each to whoever has least.

        Process 0 gets all where each process has whole weights.

        Args:
            sizes: By name.
            last_first: Of those who have equally little the last process comes first.
        """
        loads = [0] * (self.processes if self.sharded else 1)
        ranks = range(len(loads))[:: -1 if last_first else 1]
        result = {}
        for name in sorted(sizes, key=lambda each: (-sizes[each], each)):
            result[name] = min(ranks, key=lambda rank: loads[rank])
            loads[result[name]] += sizes[name]
        return result

    def any(self, ours: bool) -> bool:
        """Return whether any process says yes; where weights are spread, all have to ask."""
        if not self.sharded:
            return ours
        votes = torch.tensor([int(ours)])
        wait(distributed.all_reduce(votes, distributed.ReduceOp.MAX, self.control, async_op=True))
        return bool(votes.item())

    def text_of_process_0(self, text: str) -> str:
        """Return process 0's text on every process; where weights are spread, all have to ask."""
        if not self.sharded:
            return text
        size = torch.tensor([len(text.encode())])
        wait(distributed.broadcast(size, 0, self.control, async_op=True))
        told = torch.zeros(int(size), dtype=torch.uint8)
        if self.rank == 0:
            told = torch.tensor(list(text.encode()), dtype=torch.uint8)
        wait(distributed.broadcast(told, 0, self.control, async_op=True))
        return bytes(told.tolist()).decode()

    def sends_to(self, owner: int) -> bool:
        """Whether this process has rows of what is made whole on `owner`, or is it."""
        return owner // self.parts == self.rank // self.parts

    def whole_on(self, tensor: Tensor, owner: int, dtype: torch.dtype | None = None) -> Tensor | None:
        """Return a tensor whole on one process, None on the others, which send their rows and keep nothing.

        Every process has to call it, in the same order.

        Args:
            tensor: Own rows of it, or all.
            owner: The process that gets it.
            dtype: It is cast to it before it is gathered. None: not.
        """
        if self.mesh is None or not isinstance(tensor, DTensor):
            return tensor.detach().to(dtype or tensor.dtype) if self.rank == owner else None
        if not self.sends_to(owner):
            return None
        own: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
        return self._gather(own, tensor.shape, owner, dtype or own.dtype, self.mesh[_PARTS].get_group())

    def copy_own(self, tensor: Tensor) -> OwnCopy:
        """Copy what this process holds of a tensor to the CPU, for `whole_of_copies`."""
        own = self.own_part(tensor)
        return OwnCopy(own.to("cpu", copy=True), tensor.shape, isinstance(tensor, DTensor))

    def whole_of_copies(self, copy: OwnCopy) -> Tensor | None:
        """Return a tensor whole on process 0, made of what each copied; None on the others.

        Those that `sends_to(0)` call it, in the same order, each in one thread.
        """
        if not copy.is_part:
            return copy.own if self.rank == 0 else None
        if self.rank > 0:
            self.hand_over(copy.own.contiguous(), self.rank)
            return None
        # In place: a gather over gloo makes a second whole tensor.
        whole = copy.own.new_empty(copy.shape)
        size = -(-copy.shape[0] // self.parts)
        for rank, rows in enumerate(torch.split(whole, size)):
            if rank == 0:
                rows.copy_(copy.own)
            else:
                self.hand_over(rows, rank)
        return whole

    def own_part(self, tensor: Tensor) -> Tensor:
        """Return the rows that this process holds of a tensor; process 0 holds what is not spread."""
        own: Tensor = tensor.detach()
        if isinstance(own, DTensor):
            return own.to_local()
        return own if self.rank == 0 else own.new_empty((0, *own.shape[1:]))

    def collect(self, numbers: Tensor) -> Tensor | None:
        """Return what each process of the first copy has, [processes, ...], on process 0; None on the others.

        As `tell` and `hand_over` by the CPU, in one thread of each of those that `sends_to(0)`.
        """
        if self.background is None:
            return numbers[None]
        theirs = [torch.empty_like(numbers) for _ in range(self.parts)] if self.rank == 0 else None
        distributed.gather(numbers, theirs, dst=0, group=self.background)
        return torch.stack(theirs) if theirs is not None else None

    def tell(self, numbers: Tensor) -> None:
        """Replace numbers by those of process 0."""
        if self.background is not None:
            distributed.broadcast(numbers, 0, group=self.background)

    def hand_over(self, numbers: Tensor, sender: int) -> None:
        """Send a contiguous tensor to process 0, or receive it there in place: `sender` and 0 call it."""
        raw = numbers.view(-1).view(torch.uint8)
        if not len(raw):
            return
        if self.rank == sender:
            distributed.send(raw, 0, group=self.background)
        else:
            distributed.recv(raw, sender, group=self.background)

    def _gather(
        self, own: Tensor, shape: torch.Size, owner: int, dtype: torch.dtype, group: Any
    ) -> Tensor | None:
        """Put rows together on one process, in place, piece by piece; no second whole comes into being."""
        numbers = -(-shape[0] // self.parts) * shape[1:].numel()
        wholes = own.new_empty((self.parts, numbers), dtype=dtype) if self.rank == owner else None
        rows = own.reshape(-1)
        size = max(1, GATHERED_BYTES // (self.parts * dtype.itemsize))
        for first in range(0, numbers, size):
            last = min(first + size, numbers)
            piece = rows[first:last].to(dtype)
            if len(piece) < last - first:  # the last processes have fewer rows
                piece = nn.functional.pad(piece, (0, last - first - len(piece)))
            pieces = None if wholes is None else list(wholes[:, first:last])
            distributed.gather(piece, pieces, dst=owner, group=group)
        return None if wholes is None else wholes.view(-1)[: shape.numel()].view(shape)


WHOLE: Final = Spread()
"""One process, with whole weights."""


def in_turn(owned: Iterable[tuple[T, int]]) -> list[tuple[T, int]]:
    """Order things with their owners so that the owners, 0 first, have turns: they work at the same time.

    The things of one owner keep their order.
    """
    counts: Counter[int] = Counter()
    turns = []
    for thing, owner in owned:
        counts[owner] += 1
        turns.append((counts[owner], owner, thing))
    return [(thing, owner) for _, owner, thing in sorted(turns, key=lambda turn: turn[:2])]


def product_by_rows(left: Tensor, right: Tensor) -> Tensor:
    """Return the product of two matrices, spread as the left one is.

    Each process multiplies its own rows of it by all of the right one, which is small.
    """
    if isinstance(right, DTensor):
        right = right.redistribute(placements=[Replicate()] * right.device_mesh.ndim)
    return left @ right


def plan_spread(settings: ParallelSettings, processes: int) -> tuple[int, int]:
    """Resolve section `parallel` for a number of processes.

    Returns:
        Copies of the weights, and the number of processes that each is spread over.

    Raises:
        ConfigurationError: Another number of processes is wanted, these cannot be divided so, or this torch
            cannot spread weights as it has to be.
    """
    if settings.processes not in (None, processes):
        raise ConfigurationError(
            f"parallel.processes is {settings.processes}, but {processes} train together; start that many "
            f"(torchrun --nproc_per_node), or set parallel.processes to {processes}"
        )
    if processes % settings.sequence:
        raise ConfigurationError(
            f"parallel.sequence is {settings.sequence}, which does not divide the {processes} processes that "
            "train together; start a multiple of it, or set another"
        )
    whole = settings.mode == "replicated"
    parts = settings.shard or (1 if whole else max(1, processes // (settings.replicate or 1)))
    copies = settings.replicate or max(1, processes // parts)
    if copies * parts != processes:
        raise ConfigurationError(
            f"parallel.shard x parallel.replicate has to be the number of processes, {processes}; they are "
            f"{settings.shard or 'not set'} and {settings.replicate or 'not set'} in mode {settings.mode}"
        )
    if not whole and parts == 1 and processes > 1:
        raise ConfigurationError(
            f"with parallel.replicate {copies} each of {processes} processes holds a copy of its own, so "
            f"nothing is {settings.mode}; set a smaller one, or parallel.mode to replicated"
        )
    if parts > 1 and not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ConfigurationError(
            f"parallel.mode {settings.mode} needs torch 2.13 or newer, and this is {torch.__version__}; "
            "install it, or set parallel.mode to replicated"
        )
    return copies, parts


def make_spread(settings: ParallelSettings, *, processes: int, rank: int, device: torch.device) -> Spread:
    """Make the layout of a run's processes, which have found each other.

    Args:
        settings: Section `parallel`.
        processes: That train together.
        rank: This one.
        device: Where the weights are.

    Raises:
        ConfigurationError: See `plan_spread`.
    """
    copies, parts = plan_spread(settings, processes)
    sequence = make_sequence_group(settings.sequence, rank) if settings.sequence > 1 else None
    if parts == 1:
        return Spread(copies=copies, rank=rank, sequence=sequence)
    control = distributed.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT)
    background = distributed.new_group(list(range(parts)), backend="gloo", timeout=_CONTROL_TIMEOUT)
    mesh = init_device_mesh(device.type, (copies, parts), mesh_dim_names=(_COPIES, _PARTS))
    return Spread(
        copies=copies,
        parts=parts,
        gathered=settings.mode == "gathered",
        rank=rank,
        mesh=mesh,
        control=control,
        background=background,
        sequence=sequence,
    )


def _layers(inner: Any) -> list[nn.Module]:
    """The model's layers, as its architecture names their classes."""
    names = set(inner._no_split_modules or ())
    return [module for module in inner.modules() if type(module).__name__ in names]


def _ends(inner: Any, layers: list[nn.Module]) -> tuple[nn.Module | None, list[nn.Module]]:
    """Return the embedding, unless it is tied, and the modules of the end: embedding if tied, norm, head."""
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    if head is None:
        return None, []
    tied = any(own is other for own in embedding.parameters() for other in head.parameters())
    inside = {id(module) for layer in layers for module in layer.modules()}
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else inner
    norms = [
        module
        for module in decoder.children()
        if "norm" in type(module).__name__.lower()
        and id(module) not in inside
        and any(True for _ in module.parameters(recurse=False))
    ]
    ends = [*norms, head] if len(norms) == 1 else [head]
    return (None, [embedding, *ends]) if tied else (embedding, ends)

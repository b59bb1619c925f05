"""The trainer's side of SGLang's process group: joining it as rank 0, and broadcasting through it.

SGLang is imported only when a group is built: the trainer needs it for the transport `nccl` alone. How the
group comes together is SGLang's, so both sides use its own function.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.errors import ConfigurationError

BACKEND = "nccl"

_PACKAGE = "sglang.srt.utils"
_FUNCTION = "init_custom_process_group"


@dataclass(frozen=True, kw_only=True)
class GroupPlace:
    """Where a group meets."""

    address: str
    """Where rank 0 listens."""
    port: int
    world_size: int
    """The server's workers and the trainer."""
    name: str
    """Different for every group: torch refuses a name that is in use."""
    seconds: float
    """For coming together, and for every broadcast."""

    @property
    def url(self) -> str:
        """As torch takes it."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"tcp://{host}:{self.port}"


class SendingGroup(Protocol):
    """A group in which the trainer is rank 0."""

    @property
    def backend(self) -> str:
        """How data travels, in torch's words; the workers join with the same."""
        ...

    def join(self, place: GroupPlace) -> None:
        """Wait for the workers."""
        ...

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Send, and wait until everything has left."""
        ...

    def leave(self) -> None:
        """Abort whatever is under way, and forget the group."""
        ...


class TorchGroup:
    """A torch process group beside the trainer's own.

    Args:
        init: SGLang's function that builds one, or its equal.
        backend: How data travels.
    """

    def __init__(self, init: Callable[..., Any], *, backend: str = BACKEND) -> None:
        self._init = init
        self._backend = backend
        self._group: Any = None

    @property
    def backend(self) -> str:
        """How data travels."""
        return self._backend

    def join(self, place: GroupPlace) -> None:
        """Wait for the workers, no longer than the place says."""
        self._group = self._init(
            backend=self._backend,
            init_method=place.url,
            world_size=place.world_size,
            rank=0,
            group_name=place.name,
            timeout=timedelta(seconds=place.seconds),
        )

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Send each tensor by a broadcast of its own, in order, as the workers receive them."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        works = [self._group.broadcast([tensor], options) for tensor in tensors]
        for work in works:
            work.wait()
        if tensors and tensors[0].device.type == "cuda":  # waiting for NCCL only orders the streams
            torch.cuda.current_stream(tensors[0].device).synchronize()

    def leave(self) -> None:
        """Abort whatever is under way, and forget the group."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()
            dist.destroy_process_group(group)


def sglang_group(device: torch.device) -> Callable[[], SendingGroup]:
    """What builds groups by SGLang's own function.

    Raises:
        ConfigurationError: No GPU, or no SGLang of a version that has that function.
    """
    if device.type != "cuda":
        raise ConfigurationError(
            f"publish.transport nccl moves weights from GPU to GPU, but the model is on {device}; use "
            "publish.transport disk"
        )
    init = _sglangs_function()
    return lambda: TorchGroup(init)


def _sglangs_function() -> Callable[..., Any]:
    try:
        package = importlib.import_module(_PACKAGE)
    except ImportError as error:
        raise ConfigurationError(
            f"publish.transport nccl joins SGLang's process group by its own {_FUNCTION}, but {_PACKAGE} "
            f"cannot be imported here ({error}); install the servers' version of sglang beside the trainer, "
            "or use publish.transport disk"
        ) from error
    init: Callable[..., Any] | None = getattr(package, _FUNCTION, None)
    if init is None:
        raise ConfigurationError(
            f"publish.transport nccl joins SGLang's process group by its own {_FUNCTION}, which this version "
            "of sglang does not have; install 0.5.23 beside the trainer, or use publish.transport disk"
        )
    return init

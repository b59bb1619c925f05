"""Builds vLLM's own trainer side of a weight transfer, fed by our stream and speaking through our connection.

vLLM is imported only when an engine is built: the trainer needs it for the transports `nccl` and `ipc` alone.
The order of the steps (start, update while the data flows, finish) and the format of the data are vLLM's.
"""

from __future__ import annotations

import base64
import importlib
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from trainer.errors import ConfigurationError
from trainer.model.weight_stream import WeightStream
from trainer.publish.engines.vllm.routes import VllmRoutes
from trainer.publish.errors import Phase, ServerFailure

Backend = Literal["nccl", "ipc"]

_PACKAGE = "vllm.distributed.weight_transfer"


class TransferEngine(Protocol):
    """Declares the part of vLLM's `TrainerWeightTransferEngine` that is used here."""

    def send_weights(self) -> None:
        """Send everything and let the server load it."""
        ...

    def shutdown(self) -> None:
        """Leave the group."""
        ...


class SyncClient:
    """Steers the server for vLLM's engine (`VLLMWeightSyncClient`): routes, by way of our connection.

    Args:
        server: The server.
    """

    def __init__(self, server: VllmRoutes) -> None:
        self.server = server
        self.closed = False
        """Whether its engine was given up."""
        self.on_failure: Callable[[BaseException], None] = lambda _error: None
        """Told of a request that failed, at once: vLLM's engine itself may be waiting for the other side."""

    def close(self) -> None:
        """Refuse all further requests: an engine that was given up must not meddle with the next one's."""
        self.closed = True

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        """Let the workers join."""
        self._request("/init_weight_transfer_engine", {"init_info": dict(init_info)})

    def shutdown_weight_transfer_engine(self) -> None:
        """Let the workers leave."""
        self._request("/shutdown_weight_transfer_engine", {})

    def start_weight_update(self) -> None:
        """Let the workers prepare."""
        self._request("/start_weight_update", {})

    def update_weights(self, update_info: Mapping[str, Any] | list[Mapping[str, Any]]) -> None:
        """Let the workers take the weights that these names, types and shapes announce."""
        several = isinstance(update_info, list)
        infos = [
            _for_json(info) for info in (update_info if isinstance(update_info, list) else [update_info])
        ]
        self._request("/update_weights", {"update_info": infos if several else infos[0]})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Let the workers put the new weights to use."""
        self._request(
            "/finish_weight_update", {} if weight_version is None else {"weight_version": weight_version}
        )

    def _request(self, route: str, body: Mapping[str, Any]) -> None:
        try:
            if self.closed:
                raise self.server.failure(Phase.LOAD, f"{route} is not sent: this transfer was given up")
            self.server.weight_request(route, body)
        except ServerFailure as error:
            self.on_failure(error)
            raise


@dataclass(frozen=True, kw_only=True)
class TransferGroup:
    """Holds everything that an engine for one server is built from."""

    backend: Backend
    client: SyncClient
    stream: WeightStream
    workers: int
    """Workers of the server; with the trainer as rank 0 the group has one member more."""
    address: str
    """Where the trainer listens for the rendezvous (nccl)."""
    port: int

    @property
    def buffer_bytes(self) -> int:
        """Size of a packed piece. Both sides cut alike; nothing larger than one may exist."""
        return max(self.stream.bucket_bytes, self.stream.largest_bytes)


def require_vllm(backend: Backend, device: torch.device) -> None:
    """See that this machine can send at all.

    Raises:
        ConfigurationError: No GPU, or no vLLM of a version that has a trainer's side.
    """
    if device.type != "cuda":
        raise ConfigurationError(
            f"publish.transport {backend} moves weights from GPU to GPU, but the model is on {device}; "
            "use publish.transport disk"
        )
    _package(backend)


def build_engine(group: TransferGroup) -> TransferEngine:
    """Build vLLM's engine and let it meet the server's workers; may wait for them for ever.

    Raises:
        ConfigurationError: See `require_vllm`.
        ServerFailure: The server refused.
    """
    package = _package(group.backend)
    engine: TransferEngine = package.WeightTransferTrainerFactory.trainer_init(
        _init_info(group), client=group.client, source=_source(package, group.stream)
    )
    return engine


def _package(backend: Backend) -> Any:
    try:
        package = importlib.import_module(_PACKAGE)
    except ImportError as error:
        raise ConfigurationError(
            f"publish.transport {backend} uses vLLM's own sender, but {_PACKAGE} cannot be imported here "
            f"({error}); install the servers' version of vllm beside the trainer, or use "
            "publish.transport disk"
        ) from error
    if not hasattr(package, "WeightTransferTrainerFactory"):
        raise ConfigurationError(
            f"publish.transport {backend} uses vLLM's own sender, which this version of vllm does not have; "
            "install 0.32 or newer beside the trainer, or use publish.transport disk"
        )
    return package


def _init_info(group: TransferGroup) -> Any:
    engines = importlib.import_module(f"{_PACKAGE}.{group.backend}_engine")
    if group.backend == "ipc":
        return engines.IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=group.buffer_bytes)
    return engines.NCCLTrainerInitInfo(
        rank=0,
        master_address=group.address,
        master_port=group.port,
        world_size=group.workers + 1,
        packed=True,
        packed_buffer_size_bytes=group.buffer_bytes,
    )


def _source(package: Any, stream: WeightStream) -> Any:
    class StreamSource(package.WeightSource):  # type: ignore[misc]  # vLLM is not there when types are checked
        """Gives our stream to vLLM's engines."""

        def metadata(self) -> list[Any]:
            return [package.ParamMeta(entry.name, entry.dtype, entry.shape) for entry in stream.entries()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return stream.weights()

    return StreamSource()


def _for_json(update_info: Mapping[str, Any]) -> dict[str, Any]:
    """Pickle CUDA's handles, which are no JSON, as vLLM expects them."""
    result = dict(update_info)
    handles = result.pop("ipc_handles", None)
    if handles is not None:
        result["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(handles)).decode("ascii")
    return result

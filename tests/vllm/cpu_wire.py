"""vLLM's NCCL weight transfer with TCP in the place of NCCL: everything of vLLM's but the wire is real.

Replaced, on both sides, are the four functions that touch CUDA: opening the communicator, and moving packed
pieces. vLLM's handshake, its sender and its worker engine, the packing, the layer by layer reload and the
HTTP routes stay. A server loads `install` as a plugin (entry points `vllm.general_plugins`).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

NCCL_ENGINE = "vllm.distributed.weight_transfer.nccl_engine"


class TcpGroup:
    """A communicator that broadcasts through the rendezvous' own store."""

    def __init__(self, address: str, port: int, rank: int, world_size: int) -> None:
        utils = importlib.import_module("vllm.distributed.utils")
        self._group: Any = utils.StatelessProcessGroup.create(address, port, rank, world_size)

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        """Send the tensor's bytes, or fill it with those of `src`."""
        received = self._group.broadcast_obj(tensor if self._group.rank == src else None, src)
        assert received.shape == tensor.shape, "both sides cut the stream into the same pieces"
        tensor.copy_(received)

    def destroy(self) -> None:
        """Close the store, which wakes up whoever waits for it."""
        self._group = None


def install() -> None:
    """Replace the wire in this process."""
    engine: Any = importlib.import_module(NCCL_ENGINE)
    engine.open_trainer_endpoint = _open_sender
    engine.worker_init_process_group = _open_receiver
    engine.packed_nccl_broadcast_producer = _send_packed
    engine.packed_nccl_broadcast_consumer = _receive_packed
    engine.NCCLWeightTransferEngine.update_weights = _update_weights


def _open_sender(info: Any) -> TcpGroup:
    return TcpGroup(info.master_address, info.master_port, 0, info.world_size)


def _open_receiver(info: Any, parallel_config: Any) -> TcpGroup:
    rank = info.rank_offset + parallel_config.rank
    return TcpGroup(info.master_address, info.master_port, rank, info.world_size)


def _send_packed(
    *,
    iterator: Iterator[tuple[str, torch.Tensor]],
    group: TcpGroup,
    src: int,
    post_iter_func: Callable[[tuple[str, torch.Tensor]], torch.Tensor],
    buffer_size_bytes: int,
    num_buffers: int,
) -> None:
    packing = importlib.import_module("vllm.distributed.weight_transfer.packed_tensor")
    while (piece := packing.pack_tensors(iterator, post_iter_func, buffer_size_bytes)) is not None:
        group.broadcast(piece.packed_tensor, src)


def _receive_packed(
    *,
    iterator: Iterator[tuple[str, tuple[list[int], torch.dtype]]],
    group: TcpGroup,
    src: int,
    post_unpack_func: Callable[[list[tuple[str, torch.Tensor]]], None],
    buffer_size_bytes: int,
    num_buffers: int,
    device: Any,
) -> None:
    packing = importlib.import_module("vllm.distributed.weight_transfer.packed_tensor")
    announced = list(iterator)
    while announced:
        piece, size = [], 0
        while announced and size <= buffer_size_bytes:
            name, (shape, dtype) = announced.pop(0)
            piece.append((name, shape, dtype, math.prod(shape) * dtype.itemsize))
            size += piece[-1][3]
        packed = torch.empty(size, dtype=torch.uint8)
        group.broadcast(packed, src)
        names, shapes, dtypes, sizes = (list(column) for column in zip(*piece, strict=True))
        post_unpack_func(packing.unpack_tensor(packed, names, shapes, dtypes, sizes))


def _update_weights(self: Any, update_info: dict[str, Any]) -> None:
    """As vLLM's, without waiting for a GPU at the end."""
    self.receive_weights(self.parse_update_info(update_info))

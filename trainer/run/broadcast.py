"""Broadcasts batches: process 0 fetches, every process trains on the same bytes.

The bytes travel as a tensor, never as a pickle. While process 0 waits it tells the others so every few
seconds, so that a long wait for environments is not taken for a dead process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from atropos_client.clock import running_time
from trainer.errors import DeadlineExceeded
from trainer.run.processes import JoinedRun
from trainer.sources.incoming import BatchSource, EndOfBatches, IncomingBatch, read_incoming

logger = logging.getLogger(__name__)

_POLL_SECONDS: Final = 0.5
"""Process 0 waits so long for a batch before it looks for a request to stop."""

_HEARTBEAT_SECONDS: Final = 5.0
"""So often processes that wait hear that process 0 is alive; collective timeouts are minutes."""

_UNREADABLE: Final = b"null"
"""Stands for a batch that process 0 cannot read."""

_WAIT, _BATCH, _STOP, _END, _LATE = range(5)


class Stopped(Exception):  # noqa: N818 - an event, not a fault
    """Somebody asked the run to stop."""


def next_batch(
    joined: JoinedRun,
    source: BatchSource,
    *,
    timeout: float,
    stop_requested: Callable[[], bool],
    meanwhile: Callable[[], None] = lambda: None,
) -> IncomingBatch:
    """Wait for the next batch, the same on every process.

    Args:
        joined: The processes that share the batches.
        source: Asked on process 0 only.
        timeout: Seconds without a batch after which the run is given up.
        stop_requested: Asked on every process; one that says yes stops all.
        meanwhile: Called on process 0 before each wait for a batch and every half second of it; what it
            raises ends the wait.

    Raises:
        Stopped: The run was asked to stop.
        EndOfBatches: The source is finite and exhausted.
        DeadlineExceeded: No batch came in time; the message says who is late.
    """
    accelerator = joined.accelerator
    several = accelerator.num_processes > 1
    deadline = running_time() + timeout

    def wait() -> tuple[int, IncomingBatch | None]:
        heartbeat = running_time() + _HEARTBEAT_SECONDS
        while running_time() < heartbeat:
            if stop_requested():
                return _STOP, None
            meanwhile()
            try:
                batch = source.get(_POLL_SECONDS)
            except EndOfBatches:
                return _END, None
            if batch is not None:
                return _BATCH, batch
            if running_time() > deadline:
                return _LATE, None
        return _WAIT, None

    while True:
        # Before process 0 takes a batch that nobody would train.
        if several and joined.any(stop_requested()):
            raise Stopped
        outcome, batch = wait() if accelerator.is_main_process else (_WAIT, None)
        if several:
            outcome, batch = _share(accelerator, outcome, batch)
        if batch is not None:
            return batch
        if outcome == _STOP:
            raise Stopped
        if outcome == _END:
            raise EndOfBatches
        if outcome == _LATE:
            late = source.describe_wait() if accelerator.is_main_process else "process 0 says who is late"
            raise DeadlineExceeded(f"no batch for {timeout:.0f} s (atropos.batch_timeout): {late}")


def _share(
    accelerator: Accelerator, outcome: int, batch: IncomingBatch | None
) -> tuple[int, IncomingBatch | None]:
    """Broadcast process 0's outcome, and the batch if there is one."""
    size, version, number, body = 0, 0, 0, b""
    if batch is not None:
        # What process 0 does not read, nobody does: the others must come to the same verdict.
        body = batch.body if batch.unreadable is None else _UNREADABLE
        size, version, number = len(body), batch.served_version, batch.number
    device = accelerator.device
    header = broadcast(torch.tensor([outcome, size, version, number], dtype=torch.int64, device=device))
    outcome, size, version, number = header.tolist()
    if outcome != _BATCH:
        return outcome, None
    payload = torch.zeros(size, dtype=torch.uint8, device=device)
    if batch is not None:
        payload = torch.frombuffer(bytearray(body), dtype=torch.uint8).to(device)
    payload = broadcast(payload)
    if batch is None:
        body = payload.cpu().numpy().tobytes()
        batch = read_incoming(body, served_version=version, number=number)
    return outcome, batch

"""Process 0 fetches; every process trains on the same bytes.

The bytes travel as a tensor, never as a pickle. While process 0 waits it tells the others so every few
seconds, so that a long wait for environments is not taken for a dead process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, reduce

from trainer.errors import DeadlineExceeded
from trainer.sources import BatchSource, EndOfBatches, IncomingBatch, read_incoming

logger = logging.getLogger(__name__)

_POLL_SECONDS: Final = 0.5
"""How long process 0 waits for a batch before it looks for a request to stop."""

_HEARTBEAT_SECONDS: Final = 5.0
"""How often processes that wait hear that process 0 is alive; collective timeouts are minutes."""

_WAIT, _BATCH, _STOP, _END, _LATE = range(5)


class Stopped(Exception):  # noqa: N818 - an event, not a fault
    """Somebody asked the run to stop."""


class BatchExchange:
    """Gives every process the next batch.

    Args:
        accelerator: Whose processes share the batches.
        source: Asked on process 0 only.
        timeout: Seconds without a batch after which the run is given up.
        stop_requested: Asked on every process; one that says yes stops all.
        meanwhile: Called on process 0 before each wait for a batch and every half second of it; what it
            raises ends the wait.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        source: BatchSource,
        *,
        timeout: float,
        stop_requested: Callable[[], bool],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        self._accelerator = accelerator
        self._source = source
        self._timeout = timeout
        self._stop_requested = stop_requested
        self._meanwhile = meanwhile

    def next(self) -> IncomingBatch:
        """Wait for the next batch.

        Raises:
            Stopped: The run was asked to stop.
            EndOfBatches: The source is finite and exhausted.
            DeadlineExceeded: No batch came in time; the message says who is late.
        """
        deadline = time.monotonic() + self._timeout
        while True:
            if self._accelerator.num_processes > 1 and self._any_process_is_to_stop():
                raise Stopped
            outcome, batch = self._wait(deadline) if self._accelerator.is_main_process else (_WAIT, None)
            if self._accelerator.num_processes > 1:
                outcome, batch = self._share(outcome, batch)
            if batch is not None:
                return batch
            if outcome == _STOP:
                raise Stopped
            if outcome == _END:
                raise EndOfBatches
            if outcome == _LATE:
                raise DeadlineExceeded(
                    f"no batch for {self._timeout:.0f} s (atropos.batch_timeout): "
                    f"{self._source.describe_wait()}"
                )

    def _any_process_is_to_stop(self) -> bool:
        """All processes ask and get one answer, before process 0 takes a batch that nobody would train."""
        ours = torch.tensor([int(self._stop_requested())], device=self._accelerator.device)
        return bool(reduce(ours, reduction="sum").item())

    def _wait(self, deadline: float) -> tuple[int, IncomingBatch | None]:
        heartbeat = time.monotonic() + _HEARTBEAT_SECONDS
        while time.monotonic() < heartbeat:
            if self._stop_requested():
                return _STOP, None
            self._meanwhile()
            try:
                batch = self._source.get(_POLL_SECONDS)
            except EndOfBatches:
                return _END, None
            if batch is not None:
                return _BATCH, batch
            if time.monotonic() > deadline:
                return _LATE, None
        return _WAIT, None

    def _share(self, outcome: int, batch: IncomingBatch | None) -> tuple[int, IncomingBatch | None]:
        """Broadcast process 0's outcome, and the batch if there is one."""
        size, version, number = 0, 0, 0
        if batch is not None:
            size, version, number = len(batch.body), batch.served_version, batch.number or 0
        device = self._accelerator.device
        header = broadcast(torch.tensor([outcome, size, version, number], dtype=torch.int64, device=device))
        outcome, size, version, number = header.tolist()
        if outcome != _BATCH:
            return outcome, None
        payload = torch.zeros(size, dtype=torch.uint8, device=device)
        if batch is not None:
            payload = torch.frombuffer(bytearray(batch.body), dtype=torch.uint8).to(device)
        payload = broadcast(payload)
        if batch is None:
            body = payload.cpu().numpy().tobytes()
            batch = read_incoming(body, served_version=version, number=number or None)
        return outcome, batch

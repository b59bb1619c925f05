"""Defines what a source of batches is, and a batch as it comes from one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from atropos_client import InvalidReply, parse_batch
from atropos_client.clock import running_time
from atropos_client.fetcher import FetchedBatch
from schemas import BatchReply
from trainer.errors import DeadlineExceeded
from trainer.packing import MicroBatch
from trainer.samples.prepare import PreparedBatch


@dataclass(frozen=True, kw_only=True)
class PreparedStep:
    """A batch from which a step can be computed at once."""

    batch: PreparedBatch
    micro_batches: list[MicroBatch]
    """Empty if no sample of the batch has a gradient."""
    seconds: float
    """Seconds that preparing and packing took, parsing not counted."""


IncomingBatch = FetchedBatch[PreparedStep]
"""A batch as it came, with its step where that was prepared ahead."""


class EndOfBatches(Exception):  # noqa: N818 - an event, not a fault
    """A source that is finite has no more batches."""


class BatchSource(Protocol):
    """Gives batches to the loop."""

    party: str
    """Who is waited for, for logs."""

    def start(self) -> None:
        """Begin to provide batches."""

    def get(self, timeout: float) -> IncomingBatch | None:
        """Wait up to `timeout` seconds for a batch; None if none came.

        Raises:
            EndOfBatches: There will be no more.
        """

    def describe_wait(self) -> str:
        """Say who is late, for logs."""

    def counters(self) -> dict[str, int]:
        """Return what was counted on the way in, e.g. batches possibly lost."""

    def stop(self) -> list[bytes]:
        """Stop providing batches; safe to call twice. Returns bodies that were fetched and never taken."""


def poll_batch(
    source: BatchSource, *, seconds: float, deadline: float, timeout: float
) -> IncomingBatch | None:
    """Wait a little for the next batch; None if none came.

    Args:
        source: Gives the batch.
        seconds: How long.
        deadline: Of `running_time`, after which the run is given up.
        timeout: Seconds from the first wait to the deadline, for the message.

    Raises:
        EndOfBatches: The source is finite and exhausted.
        DeadlineExceeded: It is past the deadline; the message says who is late.
    """
    batch = source.get(seconds)
    if batch is None and running_time() > deadline:
        late = source.describe_wait()
        raise DeadlineExceeded(f"no batch for {timeout:.0f} s (atropos.batch_timeout): {late}")
    return batch


def read_incoming(body: bytes, *, served_version: int, number: int = 0) -> IncomingBatch:
    """Read a batch of which only the bytes are here; every process that reads them finds the same."""
    reply, unreadable = BatchReply(batch=None), None
    try:
        reply = parse_batch(body)
    except InvalidReply as error:
        unreadable = str(error)
    return IncomingBatch(
        reply=reply, body=body, number=number, served_version=served_version, unreadable=unreadable
    )

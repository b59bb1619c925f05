"""Process 0 conducts: it announces what comes next, and the others do their part of it.

An order is a collective of the training threads, on the group for the CPU. What goes with it travels as
bytes, never as a pickle. A process that cannot go on leaves, and the others meet an error of the connection.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Final

import torch
from torch import Tensor, distributed

from atropos_client.clock import running_time
from trainer.errors import AnotherProcessFailed
from trainer.model.collectives import keep, wait
from trainer.run.processes import JoinedRun, translated_peer_failures
from trainer.sources.incoming import BatchSource, IncomingBatch, poll_batch

_HEAR_SECONDS: Final = 0.002
"""So often the others look whether something was announced, or a thread of theirs has failed."""
_POLL_SECONDS: Final = 0.5
"""Process 0 waits so long for a batch before it looks for a request to stop."""

_HEARTBEAT_SECONDS: Final = 5.0
"""So often processes that wait hear that process 0 is alive, and are asked whether they were told to stop."""


class Order(IntEnum):
    """Announcements of process 0."""

    WAIT = auto()
    """It waits for a batch. All say whether they were asked to stop."""
    TRAIN = auto()
    """A step, with each process's share of it."""
    CAPTURE = auto()
    """It copies the weights, for a publish."""
    CAPTURE_ADAPTER = auto()
    """It copies the adapter's."""
    SEND = auto()
    """It sends weights into a server, from the live model, and asks for each of them."""
    SCORE = auto()
    """It computes the log-probs of the probes."""
    CHECKPOINT = auto()
    """It writes a checkpoint."""
    FINAL = auto()
    """It writes the finished model."""
    STOP = auto()
    """The run has ended, with an `Outcome`: the last order, after which all leave."""


class Outcome(IntEnum):
    """End of a run, as the others hear it with `Order.STOP`."""

    DONE = auto()
    STOPPED = auto()
    """Early, because a process was asked to."""
    OUT_OF_BATCHES = auto()
    """Early, because there are no more."""
    FAILED = auto()
    """Process 0 says in what."""


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """An order as one of the others hears it."""

    order: Order
    value: int
    payload: Tensor
    """[bytes] uint8: what this process needs for it."""


class Stopped(Exception):  # noqa: N818 - an event, not a fault
    """Somebody asked the run to stop."""


def announce(joined: JoinedRun, order: Order, value: int = 0, payloads: Sequence[Tensor] = ()) -> None:
    """Tell all other processes what comes next; on process 0.

    Args:
        joined: The processes of the run.
        order: They wait for it in `hear`.
        value: A number that goes with it.
        payloads: [bytes] uint8 on the CPU, one for each of the others; none: nothing goes with it.

    Raises:
        AnotherProcessFailed: One of them is gone.
    """
    if joined.count == 1:
        return
    sizes = [0, *map(len, payloads)] if payloads else [0] * joined.count
    headers = [torch.tensor([order, value, size]) for size in sizes]
    with translated_peer_failures():
        own = torch.empty_like(headers[0])
        wait(distributed.scatter(own, headers, src=0, group=joined.control, async_op=True))
        sent = [
            distributed.isend(payload, dst=rank, group=joined.control)
            for rank, payload in enumerate(payloads, start=1)
            if len(payload)
        ]
        for each in sent:
            if each is not None:
                each.wait()


def hear(joined: JoinedRun, meanwhile: Callable[[], None]) -> Announcement:
    """Wait for what process 0 announces next; on the others.

    Args:
        joined: The processes.
        meanwhile: Is called again and again; raises what another thread of this process has met.

    Raises:
        AnotherProcessFailed: It is gone.
    """
    header = torch.zeros(3, dtype=torch.int64)
    with translated_peer_failures():
        work = distributed.scatter(header, src=0, group=joined.control, async_op=True)
    keep(work)
    while not work.is_completed():
        meanwhile()
        time.sleep(_HEAR_SECONDS)
    with translated_peer_failures():
        work.wait()
        order, value, size = header.tolist()
        payload = torch.empty(size, dtype=torch.uint8)
        if size:
            distributed.recv(payload, src=0, group=joined.control)
    return Announcement(order=Order(order), value=value, payload=payload)


@contextlib.contextmanager
def together(joined: JoinedRun, order: Order, value: int = 0) -> Iterator[None]:
    """Announce an order, and do the own part of it inside; on process 0.

    In the end all say whether they could. Collectives inside are as many on all processes, whatever the disk
    of one refuses. What else fails ends the run: a process that cannot take part in them leaves.

    Raises:
        AnotherProcessFailed: One of the others could not do its part.
    """
    announce(joined, order, value)
    with _voting(joined):
        yield


@contextlib.contextmanager
def taking_part(joined: JoinedRun) -> Iterator[None]:
    """Do the own part of an order that `together` announced inside; on the others.

    A failure of another process is not raised here: process 0 announces how it goes on.
    """
    with _voting(joined, raises=False):
        yield


def end(joined: JoinedRun, outcome: Outcome) -> None:
    """Tell the others that the run has ended, when nothing is left to be done; on process 0.

    Raises:
        AnotherProcessFailed: One of them is gone.
    """
    announce(joined, Order.STOP, outcome)
    leave_together(joined)


def leave_together(joined: JoinedRun) -> None:
    """Wait for all others, as the last thing before this process leaves: its end would be their failure."""
    if joined.count > 1:
        with translated_peer_failures():
            distributed.barrier(group=joined.control)


@contextlib.contextmanager
def _voting(joined: JoinedRun, *, raises: bool = True) -> Iterator[None]:
    try:
        yield
    except OSError:  # what a disk refuses keeps nobody from the collectives inside
        joined.any(True)
        raise
    except BaseException:  # the others may wait in one of them: they meet an error when this process leaves
        joined.part()
        raise
    if joined.any(False) and raises:
        raise AnotherProcessFailed("another process could not do its part; its message says why")


def next_batch(
    joined: JoinedRun,
    source: BatchSource,
    *,
    timeout: float,
    stop_requested: Callable[[], bool],
    meanwhile: Callable[[], None] = lambda: None,
) -> IncomingBatch:
    """Wait for the next batch; on process 0.

    Args:
        joined: The processes of the run; each may have been asked to stop.
        source: Gives the batch.
        timeout: Seconds without a batch after which the run is given up.
        stop_requested: Whether this process was asked to stop.
        meanwhile: Called before each wait for a batch and every half second of it; what it raises ends the
            wait.

    Raises:
        Stopped: The run was asked to stop.
        EndOfBatches: The source is finite and exhausted.
        DeadlineExceeded: No batch came in time; the message says who is late.
    """
    deadline = running_time() + timeout
    while True:
        announce(joined, Order.WAIT)
        if joined.any(stop_requested()):  # before a batch is taken that nobody would train
            raise Stopped
        heartbeat = running_time() + _HEARTBEAT_SECONDS
        while running_time() < heartbeat:
            if stop_requested():
                raise Stopped
            meanwhile()
            batch = poll_batch(source, seconds=_POLL_SECONDS, deadline=deadline, timeout=timeout)
            if batch is not None:
                return batch

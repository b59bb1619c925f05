"""Where batches come from: the Atropos API, or a list that was recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from atropos_client import (
    AtroposClient,
    BatchPoller,
    BatchTimeout,
    InvalidReply,
    PolledBatch,
    PollerCounters,
    Timeouts,
    parse_batch,
)
from atropos_client.journal import Outcome
from schemas import BatchReply, Registration
from trainer.config import AtroposSettings, TrainerConfig
from trainer.preparation import PreparedStep
from trainer.watch import atropos_api


@dataclass(frozen=True, kw_only=True)
class IncomingBatch:
    """A batch as it came."""

    reply: BatchReply
    body: bytes
    """The reply's bytes, as received."""
    number: int | None = None
    """Its number in the journal; None: it is in none, batches are counted as they come."""
    served_version: int
    """Policy version that all inference servers had been proven to serve when it arrived; -1 if unknown."""
    prepared: PreparedStep | None = None
    """The step, prepared ahead; None: still to be prepared."""
    failure: Exception | None = None
    """Why it could not be prepared ahead."""
    unreadable: str | None = None
    """Why `body` is no batch at all; `reply` is empty then. None: it is one."""


class EndOfBatches(Exception):  # noqa: N818 - an event, not a fault
    """A source that is finite has no more batches."""


class BatchSource(Protocol):
    """What the loop takes batches from."""

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
        """What was counted on the way in, e.g. batches possibly lost."""

    def stop(self) -> list[bytes]:
        """Stop providing batches; safe to call twice. Returns bodies that were fetched and never taken."""


class BatchLedger(Protocol):
    """Where the loop notes what became of each batch; see `atropos_client.journal.Journal`."""

    def settle(
        self, number: int, outcome: Outcome, *, step: int | None = None, reason: str | None = None
    ) -> None:
        """Note what became of a batch; it counts when a checkpoint counts it."""

    def prune(self, up_to: int) -> int:
        """Delete the bodies of batches that no checkpoint needs any more."""

    def close(self) -> None:
        """Close it; nothing is noted afterwards."""


class RecordedSource:
    """Batches that were recorded earlier, in order."""

    party = "recorded batches"

    def __init__(self, bodies: Iterable[bytes], *, served_version: int = 0) -> None:
        self._bodies = iter(bodies)
        self._served_version = served_version

    def start(self) -> None:
        """Nothing to start."""

    def get(self, timeout: float) -> IncomingBatch | None:
        """Return the next batch."""
        del timeout
        body = next(self._bodies, None)
        if body is None:
            raise EndOfBatches
        return read_incoming(body, served_version=self._served_version)

    def describe_wait(self) -> str:
        """Recorded batches are never late."""
        return "recorded batches"

    def counters(self) -> dict[str, int]:
        """Nothing is counted."""
        return {}

    def stop(self) -> list[bytes]:
        """Nothing to stop, nothing fetched early."""
        return []


class AtroposSource:
    """Batches of a running Atropos API, fetched in the background and kept in memory only.

    Args:
        config: The run's configuration.
        served_version: Asked on arrival of each batch, in the poller's thread.
        step: Asked at each registration: optimizer steps done.
        prepare: Called with each batch in the order of arrival, in the poller's thread; None leaves it to
            whoever takes the batch.
    """

    def __init__(
        self,
        config: TrainerConfig,
        *,
        served_version: Callable[[], int],
        step: Callable[[], int],
        prepare: Callable[[BatchReply], PreparedStep] | None = None,
    ) -> None:
        self.party = atropos_api(config.atropos.url)
        self._client = make_client(config.atropos)
        self._ready_timeout = config.atropos.ready_timeout
        self._poller = BatchPoller(
            self._client,
            lambda: make_registration(config, step()),
            depth=config.atropos.prefetch,
            tag=served_version,
            prepare=prepare,
            heartbeat=config.atropos.heartbeat_every,
            patience=config.atropos.batch_timeout,
        )

    def start(self) -> None:
        """Wait for the API, register, and begin to poll.

        Raises:
            AtroposClientError: The API did not answer within atropos.ready_timeout.
        """
        self._client.wait_until_ready(self._ready_timeout)
        self._poller.start()

    def get(self, timeout: float) -> IncomingBatch | None:
        """Wait for a batch."""
        try:
            polled = self._poller.get(timeout)
        except BatchTimeout:
            return None
        return from_polled(polled)

    def describe_wait(self) -> str:
        """Say who is late."""
        return self._poller.explain_wait()

    def counters(self) -> dict[str, int]:
        """The poller's counters, their names prefixed `intake_`."""
        return intake_counters(self._poller.counters)

    def stop(self) -> list[bytes]:
        """Stop polling."""
        left = [polled.body for polled in self._poller.stop()]
        self._client.close()
        return left


def read_incoming(body: bytes, *, served_version: int, number: int | None = None) -> IncomingBatch:
    """A batch of which only the bytes are here; every process that reads them finds the same."""
    reply, unreadable = BatchReply(batch=None), None
    try:
        reply = parse_batch(body)
    except InvalidReply as error:
        unreadable = str(error)
    return IncomingBatch(
        reply=reply, body=body, number=number, served_version=served_version, unreadable=unreadable
    )


def from_polled(polled: PolledBatch, *, number: int | None = None) -> IncomingBatch:
    """A batch that a poller of either kind has handed out; `number`: see `IncomingBatch`."""
    return IncomingBatch(
        reply=polled.reply,
        body=polled.body,
        number=number,
        served_version=polled.tag if isinstance(polled.tag, int) else -1,
        prepared=polled.prepared if isinstance(polled.prepared, PreparedStep) else None,
        failure=polled.failure,
        unreadable=polled.unreadable,
    )


def intake_counters(counters: PollerCounters) -> dict[str, int]:
    """A poller's counters, their names prefixed `intake_`."""
    return {f"intake_{name}": value for name, value in dataclasses.asdict(counters).items()}


def make_client(settings: AtroposSettings) -> AtroposClient:
    """A client of the configured API."""
    return AtroposClient(
        settings.url,
        token=settings.token,
        headers=settings.headers,
        verify=settings.ca_file or True,
        timeouts=make_timeouts(settings),
        max_body_bytes=settings.max_body_bytes,
    )


def make_timeouts(settings: AtroposSettings) -> Timeouts:
    """The configured patience with the API."""
    return Timeouts(connect=settings.connect_timeout, batch_read=settings.read_timeout)


def make_registration(config: TrainerConfig, step: int) -> Registration:
    """What the trainer tells the API about itself; environments read most of it."""
    return Registration(
        wandb_group=config.logging.group,
        wandb_project=config.logging.project,
        batch_size=config.atropos.batch_size,
        max_token_len=config.atropos.max_token_length,
        checkpoint_dir=str(config.train.output_dir / "checkpoints"),
        save_checkpoint_interval=config.checkpoint.every,
        starting_step=step,
        num_steps=config.train.steps,
    )

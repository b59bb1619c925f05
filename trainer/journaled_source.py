"""Batches of a running Atropos API by way of the journal: on the disk before anything is done with them.

A process of its own fetches and records (`atropos_client.fetcher`); a thread here reads, parses and prepares
what was recorded, while the step before trains. What waits in the journal after the checkpoint comes first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from atropos_client import BatchTimeout
from atropos_client.fetcher import FetcherSettings, FetchingProcess
from atropos_client.journal import Journal, JournalLimits
from schemas import BatchReply
from trainer.config import TrainerConfig
from trainer.preparation import PreparedStep
from trainer.sources import (
    IncomingBatch,
    from_polled,
    intake_counters,
    make_client,
    make_registration,
    make_timeouts,
)
from trainer.watch import atropos_api

logger = logging.getLogger(__name__)

# Beyond the farewell, in which the fetching process of a trainer that was killed ends its last poll.
_LOCK_PATIENCE_SECONDS = 10.0


class JournaledSource:
    """Batches of a journal, first those that wait in it, then those that the API sends from now on.

    Args:
        config: The run's configuration.
        journal: Open for writing; closed by whoever opened it, after `stop`.
        after: Number of the last batch that the checkpoint counts.
        step: Asked at each registration: optimizer steps done.
        served_version: Asked on each arrival, roughly; in another thread.
        prepare: Called with each batch in the order of arrival, in another thread; None leaves it to whoever
            takes the batch.
    """

    def __init__(
        self,
        config: TrainerConfig,
        journal: Journal,
        *,
        after: int,
        step: Callable[[], int],
        served_version: Callable[[], int],
        prepare: Callable[[BatchReply], PreparedStep] | None = None,
    ) -> None:
        self.party = atropos_api(config.atropos.url)
        self._config = config
        self._journal = journal
        self._after = after
        self._step = step
        self._served_version = served_version
        self._prepare = prepare
        self._fetcher: FetchingProcess | None = None

    def start(self) -> None:
        """Go back to the checkpoint and begin to fetch; without a waiting batch, wait for the API first.

        Raises:
            AtroposClientError: The API did not answer within atropos.ready_timeout.
            JournalMismatch: The journal does not belong to the checkpoint.
        """
        if not self._journal.numbers_after(self._after):
            with make_client(self._config.atropos) as client:
                client.wait_until_ready(self._config.atropos.ready_timeout)
        self._fetcher = FetchingProcess(
            self._journal,
            fetcher_settings(self._config, step=self._step()),
            after=self._after,
            depth=self._config.atropos.prefetch,
            served_version=self._served_version,
            step=self._step,
            prepare=self._prepare,
        ).start()

    def get(self, timeout: float) -> IncomingBatch | None:
        """Wait for a batch."""
        try:
            polled = self._started().get(timeout)
        except BatchTimeout:
            return None
        return from_polled(polled, number=polled.number)

    def describe_wait(self) -> str:
        """Say who is late."""
        return self._started().explain_wait()

    def counters(self) -> dict[str, int]:
        """The fetching processes' counters, their names prefixed `intake_`."""
        return intake_counters(self._fetcher.counters) if self._fetcher is not None else {}

    def stop(self) -> list[bytes]:
        """Stop fetching; what was not taken waits in the journal, so nothing is returned."""
        if self._fetcher is not None:
            self._fetcher.stop()
        return []

    def _started(self) -> FetchingProcess:
        if self._fetcher is None:
            raise RuntimeError("the source was not started")
        return self._fetcher


def journal_directory(config: TrainerConfig) -> Path:
    """Where the run's journal lies."""
    return config.train.output_dir / "journal"


def open_journal(config: TrainerConfig) -> Journal:
    """Open the run's journal for writing, waiting for the fetching process of a trainer that was killed.

    Raises:
        JournalError: Another run writes to it, or it cannot be read or written.
    """
    settings = config.journal
    return Journal.open(
        journal_directory(config),
        limits=JournalLimits(max_bytes=settings.max_bytes, min_free_bytes=settings.min_free_bytes),
        wait=settings.farewell + _LOCK_PATIENCE_SECONDS,
    )


def fetcher_settings(config: TrainerConfig, *, step: int) -> FetcherSettings:
    """What the fetching process has to know."""
    atropos = config.atropos
    return FetcherSettings(
        url=atropos.url,
        registration=make_registration(config, step),
        token=atropos.token,
        headers=atropos.headers,
        ca_file=atropos.ca_file,
        timeouts=make_timeouts(atropos),
        max_body_bytes=atropos.max_body_bytes,
        heartbeat=atropos.heartbeat_every,
        patience=atropos.batch_timeout,
        farewell=config.journal.farewell,
    )

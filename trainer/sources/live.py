"""Takes batches of a running Atropos API from the journal: on the disk before anything is done with them.

A process of its own fetches and records (`atropos_client.fetcher`); a thread here reads, parses and prepares
what was recorded, while the step before trains. What waits in the journal after the checkpoint comes first.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atropos_client import AtroposClient, Timeouts
from atropos_client.fetcher import STOP_PATIENCE, Fetcher, FetcherSettings
from atropos_client.journal import Journal, JournalLimits
from schemas import BatchReply, Registration
from trainer.config import TrainerConfig, plain_url
from trainer.sources.incoming import IncomingBatch, PreparedStep

# Environments that take their last step from us leave when so many batches were formed, and count among them
# those that are not trained on. -1 would be refused by them.
_NO_LAST_STEP = 2**31 - 1


class AtroposSource:
    """Gives batches of a journal, first those that wait in it, then those that the API sends from now on.

    Args:
        config: The run's configuration.
        journal: Open for writing; closed by whoever opened it, after `stop`. None: a temporary one, so that
            what was fetched and not taken is lost with this process.
        after: Number of the last batch that the checkpoint counts.
        step: Asked at each registration: optimizer steps done.
        served_version: Asked on each arrival, roughly; in another thread.
        prepare: Called with each batch in the order of arrival, in another thread; None leaves it to whoever
            takes the batch.
    """

    def __init__(
        self,
        config: TrainerConfig,
        journal: Journal | None = None,
        *,
        after: int = 0,
        step: Callable[[], int],
        served_version: Callable[[], int],
        prepare: Callable[[BatchReply], PreparedStep] | None = None,
    ) -> None:
        self.party = f"the Atropos API at {plain_url(config.atropos.url)}"
        self._config = config
        self._journal = journal
        self._after = after
        self._step = step
        self._fetching: dict[str, Any] = {
            "after": after,
            "depth": config.atropos.prefetch,
            "served_version": served_version,
            "step": step,
            "prepare": prepare,
        }
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._fetcher: Fetcher | None = None

    def start(self) -> None:
        """Go back to the checkpoint and begin to fetch; without a waiting batch, wait for the API first.

        Raises:
            AtroposClientError: The API did not answer within atropos.ready_timeout.
            JournalMismatch: The journal does not belong to the checkpoint.
        """
        settings = fetcher_settings(self._config, step=self._step())
        if self._journal is None or not self._journal.numbers_after(self._after):
            with AtroposClient(settings) as client:
                client.wait_until_ready(self._config.atropos.ready_timeout)
        if self._journal is None:
            self._temporary = tempfile.TemporaryDirectory(
                prefix="atropos-batches-", ignore_cleanup_errors=True
            )
            self._journal = Journal.open(Path(self._temporary.name), limits=journal_limits(self._config))
            # What comes later than `stop` waits can be kept nowhere: it is counted as possibly lost.
            settings = settings.model_copy(update={"farewell": min(settings.farewell, STOP_PATIENCE / 2)})
        self._fetcher = self._make_fetcher(self._journal, settings, **self._fetching).start()

    def _make_fetcher(self, journal: Journal, settings: FetcherSettings, **options: Any) -> Fetcher:
        return Fetcher(journal, settings, **options)

    def get(self, timeout: float) -> IncomingBatch | None:
        """Wait for a batch."""
        batch = self._started().get(timeout)
        if batch is None:
            return None
        if self._temporary is not None and self._journal is not None:
            self._journal.settle(batch.number, "skipped", reason="it was handed on")
            self._journal.prune(batch.number)
            return dataclasses.replace(batch, number=0)
        return batch

    def describe_wait(self) -> str:
        """Say who is late."""
        return self._started().explain_wait()

    def counters(self) -> dict[str, int]:
        """Return what was counted while fetching, the names prefixed `intake_`."""
        if self._fetcher is None:
            return {}
        counted = dataclasses.asdict(self._fetcher.counters)
        return {f"intake_{name}": value for name, value in counted.items()}

    def stop(self) -> list[bytes]:
        """Stop fetching; returns what was fetched and not taken, unless it waits in the run's journal."""
        if self._fetcher is not None:
            self._fetcher.stop()
        if self._temporary is None or self._journal is None:
            return []
        waiting = [entry.number for entry in self._journal.ledger() if entry.outcome == "received"]
        left = [self._journal.read(number).body for number in waiting]
        self._journal.close()
        self._temporary.cleanup()
        self._journal = None
        return left

    def _started(self) -> Fetcher:
        if self._fetcher is None:
            raise RuntimeError("the source was not started")
        return self._fetcher


def journal_limits(config: TrainerConfig) -> JournalLimits:
    """Return the configured bounds of the journal."""
    return JournalLimits(max_bytes=config.journal.max_bytes, min_free_bytes=config.journal.min_free_bytes)


def fetcher_settings(config: TrainerConfig, *, step: int) -> FetcherSettings:
    """Make the settings of the fetching process."""
    atropos = config.atropos
    return FetcherSettings(
        url=atropos.url,
        registration=make_registration(config, step),
        token=atropos.token,
        headers=atropos.headers,
        ca_file=atropos.ca_file,
        timeouts=Timeouts(connect=atropos.connect_timeout, batch_read=atropos.read_timeout),
        max_body_bytes=atropos.max_body_bytes,
        heartbeat=atropos.heartbeat_every,
        patience=atropos.batch_timeout,
        farewell=config.journal.shutdown_timeout,
    )


def make_client(config: TrainerConfig) -> AtroposClient:
    """Make a client of the configured API."""
    return AtroposClient(fetcher_settings(config, step=0))


def make_registration(config: TrainerConfig, step: int) -> Registration:
    """Make what the trainer tells the API about itself; environments read most of it."""
    checkpoints = config.atropos.environment_checkpoint_dir
    return Registration(
        wandb_group=config.logging.group,
        wandb_project=config.logging.project,
        batch_size=config.atropos.batch_size,
        max_token_len=config.atropos.max_token_length,
        # Environments run in directories of their own: a relative path would mean another place to each.
        checkpoint_dir="" if checkpoints is None else str(checkpoints.absolute()),
        save_checkpoint_interval=-1 if checkpoints is None else config.checkpoint.every,
        starting_step=step,
        num_steps=_NO_LAST_STEP,
    )

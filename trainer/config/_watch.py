"""Watchdog and health: sections `watchdog` and `health`."""

from __future__ import annotations

from pydantic import Field

from trainer.config._atropos import PositiveSeconds
from trainer.config._base import Section


class WatchdogSettings(Section):
    """Ends a run that is stuck: a deadline for each phase of the training thread."""

    enabled: bool = True
    """Watch the phases. A phase that outlasts its deadline has the stacks of all threads written to standard
    error and to <output_dir>/stacks.txt, and the process ends with exit code 75."""
    starting_timeout: PositiveSeconds | None = None
    """Seconds for loading the model and finding the Atropos API. None: an hour, `atropos.ready_timeout` and
    `journal.shutdown_timeout`."""
    waiting_timeout: PositiveSeconds | None = None
    """Seconds for waiting for a batch, which `atropos.batch_timeout` ends by itself. None: ten minutes more
    than that."""
    preparing_timeout: PositiveSeconds = 1800.0
    """Seconds for preparing a batch that was not prepared ahead."""
    training_timeout: PositiveSeconds = 7200.0
    """Seconds for one optimizer step."""
    publishing_timeout: PositiveSeconds | None = None
    """Seconds for a publish, or for the wait for the one before. None: an hour, and twice
    the sum of `publish.ready_timeout`, `publish.retry_seconds`, `publish.load_timeout`,
    `publish.verify_timeout` and six times `publish.pause_timeout`."""
    checkpointing_timeout: PositiveSeconds = 3600.0
    """Seconds for writing a checkpoint."""
    stopping_timeout: PositiveSeconds = 3600.0
    """Seconds for the end of a run: its threads, the fetching process, the finished model."""
    grace: float = Field(default=10.0, ge=0)
    """Seconds between the stacks and the end of the process. /health answers 503 in them, and a phase that
    ends after all lets the run go on."""
    frozen_timeout: float = Field(default=900.0, ge=10)
    """Seconds in which no Python of this process runs at all, as where C code keeps the interpreter's lock
    (or the process was stopped by a signal); then it ends with exit code 1, the stacks on standard
    error."""


class HealthSettings(Section):
    """Reports the state of the run to an orchestrator."""

    port: int | None = Field(default=None, ge=0, le=65535)
    """TCP port of `GET /health`. 0: any free one, which the log and health.json name. None: no server."""
    host: str = "127.0.0.1"
    """Address that it listens on. It has no authentication: leave it on loopback, or behind a proxy."""
    prometheus: bool = False
    """Also serve `GET /metrics` in Prometheus' format (needs the package prometheus_client)."""
    file_every: PositiveSeconds | None = 10.0
    """Seconds between two writings of <output_dir>/health.json, which holds what /health answers. None: no
    such file."""

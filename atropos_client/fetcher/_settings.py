"""Describes what the fetching process is told when it starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from atropos_client._settings import ConnectionSettings
from atropos_client.journal import JournalLimits
from schemas import Registration


class FetcherSettings(ConnectionSettings):
    """Says how to reach the API and how to poll it."""

    registration: Registration
    """The registration to send; its `starting_step` is kept current."""
    first_pause: float = Field(default=0.1, gt=0)
    """Seconds between polls when the API has no data; doubles."""
    longest_pause: float = 1.0
    """Seconds that this pause never exceeds."""
    longest_failure_pause: float = 15.0
    """Seconds that the pause after failures never exceeds."""
    heartbeat: float = Field(default=60.0, gt=0)
    """Seconds between two log lines that say who is late."""
    patience: float = Field(default=900.0, gt=0)
    """Seconds without any proper answer of the API after which fetching ends."""
    farewell: float = 60.0
    """Seconds that a poll under way may still take when the trainer is gone or stops."""


class Order(BaseModel):
    """Holds the settings and what only the parent process knows: the first line of standard input."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: FetcherSettings
    directory: Path
    """Of the journal."""
    limits: JournalLimits
    """Its bounds."""
    lock_descriptor: int
    """Inherited: the right to write to it."""
    parent_pid: int
    """Process id of the trainer."""
    log_level: int
    """Lines below are not logged."""

    def to_line(self) -> bytes:
        """Return it as a line of JSON, secrets included: for a pipe, never for a log."""
        fields: dict[str, Any] = self.model_dump(mode="json")
        settings = self.settings
        fields["settings"]["token"] = settings.token.get_secret_value() if settings.token else None
        fields["settings"]["headers"] = {
            name: value.get_secret_value() for name, value in settings.headers.items()
        }
        return json.dumps(fields).encode() + b"\n"

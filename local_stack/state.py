"""What the local stack shows while it runs."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from local_stack.records import PublishRow, StepRow


@dataclass(kw_only=True)
class RunState:
    """Everything a display needs to know; the launcher changes it, displays only read it."""

    model: str
    """The model as the user named it."""
    steps: int
    """Optimizer steps that were asked for."""
    seed: int
    run_dir: Path
    phase: str = "starting"
    """What is being done, in one or a few words."""
    services: dict[str, str] = field(default_factory=dict)
    """State of each service, by name: starting, ready, stopping or stopped."""
    rows: list[StepRow] = field(default_factory=list)
    """Steps so far, in order."""
    publishes: list[PublishRow] = field(default_factory=list)
    """The last publish of each version so far, in order of versions."""
    heldout_before: float | None = None
    heldout_after: float | None = None
    started_at: float = field(default_factory=time.monotonic)
    training_since: tuple[float, int] | None = None
    """When the first step of this session was done, by the monotonic clock, and its number."""

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started_at

    @property
    def steps_done(self) -> int:
        """Highest step so far."""
        return self.rows[-1].step if self.rows else 0

    @property
    def seconds_left(self) -> float | None:
        """Estimate of the seconds until the last step; None until three steps of this session are done."""
        if self.training_since is None:
            return None
        since, done_before = self.training_since
        done = self.steps_done - done_before
        return (time.monotonic() - since) / done * (self.steps - self.steps_done) if done >= 2 else None

    @property
    def publishes_made(self) -> int:
        """Versions that were published."""
        return len(self.publishes)

    @property
    def publishes_verified(self) -> int:
        """Published versions that were proven to be served."""
        return sum(row.publish_verified for row in self.publishes)

    @property
    def publish_pause_seconds(self) -> float | None:
        """Seconds that generation stood still for a publish: the median; None before the first."""
        return (
            statistics.median(row.publish_pause_seconds for row in self.publishes) if self.publishes else None
        )

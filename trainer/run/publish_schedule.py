"""Decides which steps are published, and when, and writes a row of each publish.

How weights reach the inference servers, and how it is proven: `trainer.publish`.
"""

from __future__ import annotations

from collections.abc import Callable

from trainer.config import TrainerConfig, plain_url
from trainer.monitoring import Progress, RunPhase
from trainer.publish import Publisher
from trainer.run.metrics import Row, RowWriter


class PublishSchedule:
    """Publishes the steps of a run.

    Args:
        publisher: How weights reach the inference servers; None: nothing is published.
        config: The run's configuration.
        rows: Where the row of a publish goes when it is known how it went.
        stop_requested: Whether the run is to end.
        progress: Where the phase is noted.
    """

    def __init__(
        self,
        publisher: Publisher | None,
        config: TrainerConfig,
        *,
        rows: RowWriter,
        stop_requested: Callable[[], bool],
        progress: Progress,
    ) -> None:
        self._publisher = publisher
        self._every = config.publish.every
        self._rows = rows
        self._stop_requested = stop_requested
        self._progress = progress
        urls = [plain_url(url) for url in config.publish.servers]
        self._servers = f"the inference server{'s' if len(urls) != 1 else ''} {', '.join(urls)}"
        self._newest = -1  # the step whose publish was last begun

    def start(self, step: int) -> None:
        """Wait until the step that the run goes on from is served."""
        if self._publisher is None:
            return
        with self._progress.phase(RunPhase.PUBLISHING, self._servers):
            self._publisher.start(step)
        self._newest = step

    def publish(self, step: int) -> None:
        """Publish a step just done if it is time; how it went is written when it is known."""
        if self._publisher is None or step % self._every or self._stop_requested():
            return
        with self._progress.phase(RunPhase.PUBLISHING, self._servers):
            self._publisher.begin(step)
        self._newest = step

    def tend(self, step: int) -> None:
        """Between steps and while waiting for a batch."""
        if self._publisher is not None:
            self._publisher.tend(step)
            self.write_rows(step)

    def finish(self, step: int) -> None:
        """The last step is served, and proven, before the run ends; not if it was asked to stop.

        Then only a publish under way is waited for: whoever asked may not have the time for another, and
        the next start publishes what the checkpoint has.
        """
        if self._publisher is None:
            return
        with self._progress.phase(RunPhase.PUBLISHING, self._servers):
            if self._newest != step and not self._stop_requested():
                self._publisher.begin(step)
            self._publisher.settle()
        self.write_rows(step)

    def write_rows(self, step: int) -> None:
        """Write the rows of the publishes that have ended; `step` is the current one."""
        for report in self._publisher.take_reports() if self._publisher is not None else ():
            row: Row = {name.replace("/", "_"): value for name, value in report.metrics().items()}
            row["publish_seconds"] = row.pop("publish_total_seconds")
            row["publish_verified"] = report.verified
            row["publish_already_served"] = report.already_served
            self._rows.write(
                {"kind": "publish", "step": report.version, "version": report.version, **row}, step=step
            )

    def close(self) -> None:
        """End everything that goes on in the background."""
        if self._publisher is not None:
            self._publisher.close()

"""Where a run's rows of metrics go: its file, the experiment trackers, and whoever looks on."""

from __future__ import annotations

from collections.abc import Callable

from trainer.config import TrainerConfig
from trainer.metrics import MetricsFile, Row
from trainer.setup import Prepared


class RowWriter:
    """Writes the rows of a run, on process 0 only.

    Args:
        config: The run's configuration.
        prepared: Rows after its checkpoint, which a resumed run computes again, are dropped.
        on_row: Called with every row, e.g. to show progress.
    """

    def __init__(
        self, config: TrainerConfig, prepared: Prepared, *, on_row: Callable[[Row], None] | None
    ) -> None:
        self._config = config
        self._accelerator = prepared.accelerator
        self._on_row = on_row
        if self._accelerator.is_main_process:
            state = prepared.state
            self._file = MetricsFile(
                config.train.output_dir / "metrics.jsonl",
                resumed_step=state.step if state else 0,
                resumed_batch=state.batches if state else 0,
            )

    def start_trackers(self) -> None:
        """Open the configured experiment trackers with the settings of the run."""
        settings = self._config.logging
        if settings.trackers:
            # Trackers take plain values only; secrets are masked by the dump.
            dump = self._config.model_dump(mode="json")
            flat = {f"{name}.{key}": str(value) for name, part in dump.items() for key, value in part.items()}
            run_options = {"wandb": {"group": settings.group}} if settings.group else {}
            self._accelerator.init_trackers(settings.project, config=flat, init_kwargs=run_options)

    def write(self, row: Row, *, step: int) -> None:
        """Write a row.

        Args:
            row: The row; it may tell of an earlier step, whose publish has only now ended, say.
            step: The current step: what trackers sort by, and some take no step before the newest.

        Raises:
            MetricsError: It cannot be written.
        """
        if not self._accelerator.is_main_process:
            return
        self._file.write(row)
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        self._accelerator.log(numbers, step=step)
        if self._on_row is not None:
            self._on_row(row)

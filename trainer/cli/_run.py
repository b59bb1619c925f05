"""`atropos-train run`: train against a running Atropos API."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import TYPE_CHECKING

from trainer.cli._logging import configure_logging
from trainer.cli._settings import add_settings, read_settings
from trainer.cli._signals import ECHO_SECONDS, StopSignals, exit_code

if TYPE_CHECKING:
    from trainer.config import TrainerConfig
    from trainer.loop import RunSummary
    from trainer.sources import BatchSource

logger = logging.getLogger(__name__)


class RunCommand:
    """Trains until train.steps, SIGINT or SIGTERM; see `Command`."""

    name = "run"
    help = "train against a running Atropos API"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Take all settings."""
        add_settings(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Run, and say how it ended."""
        config = read_settings(args)
        configure_logging(config.logging.level)
        from atropos_client import AtroposClientError
        from trainer.errors import ConfigurationError, TrainerError

        try:
            summary = train(config)
        except ConfigurationError:
            raise
        except (TrainerError, AtroposClientError, OSError) as error:  # OSError: a disk that is full, say
            logger.error("The run failed: %s: %s", type(error).__name__, error)  # noqa: TRY400 - expected
            return 1
        return report(summary)


def train(config: TrainerConfig, *, source: BatchSource | None = None) -> RunSummary:
    """Build a run from its configuration and run it, stopping cleanly at the first signal.

    Args:
        config: The configuration.
        source: Where batches come from. None: the configured Atropos API.
    """
    # torch and transformers take seconds to load.
    from transformers.utils import logging as transformers_logging

    from trainer.assembly import build_trainer
    from trainer.cli._progress import show_step
    from trainer.watch import Watch

    transformers_logging.disable_progress_bar()
    with Watch(config) as watch:
        on_row = show_step if config.logging.progress else None
        trainer = build_trainer(config, source=source, on_row=on_row, progress=watch.progress)
        signals = StopSignals(
            trainer.request_stop,
            nothing_to_save=lambda: trainer.starting,
            grace=config.checkpoint.grace,
            echo=ECHO_SECONDS if trainer.processes > 1 else 0.0,
        )
        with signals:
            return trainer.run()


def report(summary: RunSummary) -> int:
    """Say how a run ended; returns the exit code."""
    set_aside = {name: count for name, count in summary.counters.items() if count}
    sys.stderr.write(
        f"{'Stopped' if summary.stopped_early else 'Done'} after {summary.step} optimizer steps"
        f"{f' ({summary.stopped_early})' if summary.stopped_early else ''}.\n"
        f"  checkpoint   {summary.checkpoint}\n"
        + (f"  final model  {summary.final_model}\n" if summary.final_model else "")
        + (f"  counted      {', '.join(f'{k} {v}' for k, v in set_aside.items())}\n" if set_aside else "")
    )
    return exit_code(summary.stopped_early) if summary.stopped_early in ("SIGINT", "SIGTERM") else 0

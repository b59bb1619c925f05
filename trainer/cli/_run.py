"""`atropos-train run`: train against a running Atropos API."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from contextlib import closing, suppress
from functools import partial
from typing import TYPE_CHECKING, Final

from schemas import count_of
from trainer.cli._failures import FAILED, how_to_go_on
from trainer.cli._logging import configure_logging
from trainer.cli._settings import add_settings, read_settings
from trainer.cli._signals import StopSignals, exit_code, is_stop_signal
from trainer.launch import launched_rank

if TYPE_CHECKING:
    from trainer.config import TrainerConfig
    from trainer.errors import AnotherProcessFailed
    from trainer.monitoring import Progress
    from trainer.run.follower import Follower
    from trainer.run.loop import RunSummary, Trainer
    from trainer.run.start import Accept
    from trainer.sources.incoming import BatchSource
    from trainer.view.worker import GuardedSite, ViewWorker

logger = logging.getLogger(__name__)

_UNNOTICED_SECONDS: Final = 15.0
"""A training thread that has not noticed the end of another process for so long waits for it for ever."""


class RunCommand:
    """Trains until train.steps or a signal to stop; see `Command`."""

    name = "run"
    help = "train against a running Atropos API"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Take all settings."""
        add_settings(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Run, and say how it ended."""
        config = read_settings(args)
        configure_logging(config.logging.level)
        return report(train(config), config)


def train(
    config: TrainerConfig, *, source: BatchSource | None = None, accept: Accept | None = None
) -> RunSummary:
    """Build a run from its configuration and run it, stopping cleanly at the first signal.

    Args:
        config: The configuration.
        source: Where batches come from. None: the configured Atropos API.
        accept: Whether the batches of `source` go on from a checkpoint. None: from any.
    """
    # torch and transformers take seconds to load.
    from transformers.utils import logging as transformers_logging

    from trainer.cli._progress import show_step
    from trainer.config import describe_preset
    from trainer.monitoring import RunMonitor
    from trainer.run.build import build_trainer
    from trainer.run.processes import join_run
    from trainer.view.worker import ViewWorker

    if config.loss.preset is not None and launched_rank() == 0:
        logger.info("loss.preset %s: %s", config.loss.preset, describe_preset(config.loss.preset, config))
    transformers_logging.disable_progress_bar()
    with (
        join_run(config) as joined,
        joined.explained_failures(),
        closing(ViewWorker(config.train.output_dir)) as worker,
        RunMonitor(config, site=_site(config, worker)) as monitor,
    ):
        monitor.progress.processes = joined.count
        if joined.peers is not None:
            monitor.progress.silent_processes = joined.peers.silent
        on_row = show_step if config.logging.progress else None
        trainer = build_trainer(
            config, source=source, accept=accept, joined=joined, on_row=on_row, progress=monitor.progress
        )
        if joined.peers is not None:
            joined.peers.on_end = partial(leave_after_another, trainer, monitor.progress)
        signals = StopSignals(
            trainer.request_stop,
            nothing_to_save=lambda: trainer.starting,
            grace=config.checkpoint.grace,
        )
        with signals:
            return trainer.run()


def _site(config: TrainerConfig, worker: ViewWorker) -> GuardedSite | None:
    """The page of the run on its health port; None where nobody could see it there."""
    from trainer.view.access import Access
    from trainer.view.worker import GuardedSite

    access = Access.of_environment(config.health.host)
    return GuardedSite(access, worker.answer) if access.is_open else None


def leave_after_another(
    trainer: Trainer | Follower, progress: Progress, end: AnotherProcessFailed, seconds: float
) -> None:
    """See that this process ends after another, though its training thread may not notice; in any thread.

    Waits between steps are ended as by a signal. A step, where a collective may wait for the one that is gone
    (NCCL does not notice), and whatever the processes other than 0 do, is cut off.

    Args:
        trainer: This process's part of the run.
        progress: What it is doing.
        end: What the other process said.
        seconds: Since it was heard.
    """
    from trainer.monitoring import RunPhase

    trainer.request_stop("another process has ended")
    training = progress.status.phase is RunPhase.TRAINING
    if seconds < _UNNOTICED_SECONDS or not (launched_rank() or training or trainer.starting):
        return
    if not end.told:
        logger.critical("failed: %s", end)
    logging.shutdown()
    os._exit(FAILED)


def report(summary: RunSummary, config: TrainerConfig) -> int:
    """Say how a run ended and what to do next, on process 0; returns the exit code."""
    from trainer.run.loop import ASKED_ELSEWHERE, NO_MORE_BATCHES

    steps, reason = summary.step, summary.stopped_early
    code = 0
    if reason is not None and is_stop_signal(reason):
        code = exit_code(reason)
    elif reason == ASKED_ELSEWHERE:  # the run is not done on this machine either
        code = exit_code("SIGTERM")
    elif reason == NO_MORE_BATCHES and not steps:
        code = FAILED
    if launched_rank() != 0:
        return code
    done = count_of(steps, "optimizer step")
    if reason is None:
        said = (
            f"Done after {done}: the model is {summary.final_model} (vllm serve "
            f"{summary.final_model}); a larger --train.steps trains it further."
        )
    elif reason == NO_MORE_BATCHES and not steps:
        said = "Nothing was trained, because no batch could be used: "
        said += f"{config.train.output_dir / 'metrics.jsonl'} says of each why."
    else:
        said = f"Stopped after {done} ({reason}): {how_to_go_on(config, summary.checkpoint)}"
        said += f"; with --train.steps {steps} it writes the model." if reason == NO_MORE_BATCHES else "."
    counted = ", ".join(f"{name} {count}" for name, count in summary.counters.items() if count)
    with suppress(OSError):  # nobody reads it any more
        sys.stderr.write(said + "\n" + (f"Counters, as in metrics.jsonl: {counted}.\n" if counted else ""))
    return code

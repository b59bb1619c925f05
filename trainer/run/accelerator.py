"""Makes the Accelerator, which finds the other processes of a run. The one place that does."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Final

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from schemas import count_of
from trainer.config import ParallelSettings, TrainerConfig
from trainer.errors import ConfigurationError
from trainer.launch import (
    launched_on_cpu,
    launched_processes,
    launched_rank,
    nodes,
    refuse_separate_runs,
    require_whole_launch,
    started_by_accelerate_alone,
    take_settings_of_accelerate,
)
from trainer.model.load import choose_mixed_precision
from trainer.model.sharding import plan_spread

logger = logging.getLogger(__name__)

PROCESS_GROUP_TIMEOUT: Final = timedelta(hours=2)
"""Processes wait for process 0 while it publishes, which may take as long as its deadlines add up to."""

_REMINDER_SECONDS: Final = 60.0


def make_accelerator(config: TrainerConfig) -> Accelerator:
    """Make the Accelerator, once the others are there.

    Raises:
        ConfigurationError: Accelerate was told what this trainer does not do, or has trained in another
            precision in this process, or the processes that were started do not train together, or not so
            many.
    """
    require_whole_launch()
    alone = started_by_accelerate_alone()
    take_settings_of_accelerate()
    # Accelerate looks for the others of a launcher on a CPU only if it is told that it is one.
    on_cpu = config.train.device == "cpu" or launched_on_cpu() or not torch.accelerator.is_available()
    device = torch.device("cpu") if on_cpu else _default_device()
    precision = choose_mixed_precision(config.train, device)
    _refuse_another_precision(precision)
    with _reminded_of_others():
        accelerator = Accelerator(
            mixed_precision=precision,
            cpu=on_cpu,
            log_with=list(config.logging.trackers) or None,
            project_dir=str(config.train.output_dir),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_GROUP_TIMEOUT)],
        )
    refuse_separate_runs(accelerator.num_processes, alone=alone)
    plan_spread(config.parallel, accelerator.num_processes)
    return accelerator


def describe_processes(accelerator: Accelerator, settings: ParallelSettings) -> str:
    """Say how many processes train together, where, and how the weights are spread over them."""
    count = int(accelerator.num_processes)
    if count == 1:
        return count_of(count, "process")
    copies, parts = plan_spread(settings, count)
    said = f"{count_of(count, 'process')} on {count_of(nodes(count), 'node')}"
    if parts > 1:
        said += (
            f", each of {copies} copies {settings.mode} over {parts}" if copies > 1 else f", {settings.mode}"
        )
    if settings.sequence > 1:
        said += f", {settings.sequence} to a sequence"
    return said


def _refuse_another_precision(precision: str) -> None:
    """Accelerate keeps the mixed precision of a process's first run, and trains no second run in another."""
    if AcceleratorState._shared_state and (first := AcceleratorState().mixed_precision) != precision:
        raise ConfigurationError(
            f"this process has trained with mixed precision {first!r}, and Accelerate keeps one a process: "
            f"start another process to train with {precision!r}"
        )


@contextlib.contextmanager
def _reminded_of_others() -> Iterator[None]:
    """Say every minute that the others have not come yet; nothing else watches over the run until then."""
    met = threading.Event()
    place = f"{os.environ.get('MASTER_ADDR', 'this machine')}:{os.environ.get('MASTER_PORT', '29500')}"

    def remind() -> None:
        waited = 0.0
        while not met.wait(_REMINDER_SECONDS):
            waited += _REMINDER_SECONDS
            logger.warning(
                "process %d of %d waits at %s (MASTER_ADDR:MASTER_PORT) for the others, for %.0f s of %.0f s",
                *(launched_rank(), launched_processes(), place),
                *(waited, PROCESS_GROUP_TIMEOUT.total_seconds()),
            )

    if launched_processes() > 1:
        threading.Thread(target=remind, name="meeting", daemon=True).start()
    try:
        yield
    finally:
        met.set()


def _default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")

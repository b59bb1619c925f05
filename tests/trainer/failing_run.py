"""A run of which one process fails: `... MODEL OUTPUT RANK WHERE HOW [settings]`, under a launcher.

After two steps the process RANK fails where it enters the phase WHERE, or in the middle of a step ("step").
HOW is "raise" or "kill"; with "kill while" it dies while process 0 is there.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trainer.monitoring.monitor
import trainer.run.build
from tests.trainer import stoppable_run
from trainer.launch import launched_rank
from trainer.monitoring import Progress, RunPhase
from trainer.run.optimizer_step import StepRunner

_BEFORE = 2
"""Steps that all processes have done."""

trained = 0
failed = False


def fail_if_due(where: str) -> None:
    """Fail here, if it is time and the place; once."""
    global failed
    _, output, rank, failing_where, how = sys.argv[1:6]
    if failed or trained < _BEFORE or where != failing_where:
        return
    failed = True
    ours = launched_rank() == int(rank)
    if ours and how == "raise":
        raise RuntimeError("nothing works")
    if ours and how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if not ours and how == "kill while":
        Path(output, "now").touch()
        time.sleep(2)


class FailingProgress(Progress):
    """Fails where a phase is entered."""

    @contextmanager
    def phase(self, phase: RunPhase, party: str, details: Callable[[], str] | None = None) -> Iterator[None]:
        """Enter a phase."""
        global trained
        with super().phase(phase, party, details):
            fail_if_due(phase)
            yield
        trained += phase is RunPhase.TRAINING


class FailingSteps(StepRunner):
    """Fails in the middle of a step."""

    def _backward(self, *words: Any) -> Any:
        fail_if_due("step")
        return super()._backward(*words)


def die_at_a_sign(sign: Path) -> None:
    """End this process when the file is there."""
    while not sign.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    model, output, rank, _, how, *others = sys.argv[1:]
    trainer.monitoring.monitor.Progress = FailingProgress  # type: ignore[misc]
    trainer.run.build.StepRunner = FailingSteps  # type: ignore[misc]
    if launched_rank() == int(rank) and how == "kill while":
        threading.Thread(target=die_at_a_sign, args=(Path(output, "now"),), daemon=True).start()
    sys.exit(stoppable_run.main(model, output, "steps", *others))

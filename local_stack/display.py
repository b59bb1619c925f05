"""Shows a run while it goes on: one line for each event, and on a terminal a bar of progress below them."""

from __future__ import annotations

import math
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from local_stack.records import PublishRow, RunRecords, StepRow

_REDRAW_SECONDS = 0.5


class Display:
    """Prints each new phase, evaluation, step and publish once; entered while the run goes on.

    Args:
        console: Where to print; the bar is drawn on a terminal only.
        steps: Optimizer steps that were asked for.
    """

    def __init__(self, console: Console, *, steps: int) -> None:
        self.started_at = time.monotonic()
        self.phase = ""
        """The present activity, in a few words."""
        self._console = console
        self._steps = steps
        self._steps_shown = 0
        self._publishes_shown = 0
        self._evaluation_shown = False
        self._drawn_at = -math.inf
        # Drawn only from update(): a refresh thread would draw between a signal and its handling.
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
            transient=True,
            speed_estimate_period=600,  # seconds: one step takes half a minute
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task("", total=steps)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def enter(self, phase: str) -> None:
        """Say what is done from now on, if it is something else."""
        if phase != self.phase:
            self.phase = phase
            self._say(phase)

    def tell(self, text: str) -> None:
        """Say something once."""
        self._say(text)

    def update(self, records: RunRecords) -> None:
        """Show what is new; called about ten times a second."""
        if records.heldout_before is not None and not self._evaluation_shown:
            self._evaluation_shown = True
            self._say(f"held-out score before training: {records.heldout_before:.1%}")
        for step in records.steps[self._steps_shown :]:
            self._say(describe_step(step, self._steps))
        for publish in records.publishes[self._publishes_shown :]:
            self._say(describe_publish(publish))
        self._steps_shown, self._publishes_shown = len(records.steps), len(records.publishes)
        now = time.monotonic()
        if now - self._drawn_at >= _REDRAW_SECONDS:  # the processor is wanted for other things
            self._drawn_at = now
            done = records.steps[-1].step if records.steps else 0
            self._progress.update(self._bar, description=self.phase, completed=done, refresh=True)

    def _say(self, text: str) -> None:
        seconds = time.monotonic() - self.started_at
        self._console.print(f"[{seconds:5.0f} s] {text}", markup=False, highlight=False, soft_wrap=True)


def describe_step(row: StepRow, steps: int) -> str:
    """Put one step into one line, e.g. `step 3/30  reward 0.412  loss +0.0123  210 tokens/s`."""
    parts = [f"step {row.step}/{steps}"]
    if row.reward_mean is not None:
        parts.append(f"reward {row.reward_mean:.3f}")
    if row.loss is not None:
        parts.append(f"loss {row.loss:+.4f}")
    if row.tokens_per_second is not None:
        parts.append(f"{row.tokens_per_second:.0f} tokens/s")
    return "  ".join(parts)


def describe_publish(row: PublishRow) -> str:
    """Put one publish into one line, e.g. `version 3 published in 1.8 s  paused 0.6 s  verified`."""
    proof = "verified" if row.publish_verified else "NOT VERIFIED"
    return (
        f"version {row.version} published in {row.publish_seconds:.1f} s"
        f"  paused {row.publish_pause_seconds:.1f} s  {proof}"
    )

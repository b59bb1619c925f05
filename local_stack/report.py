"""The report of a finished run: `report.json` for programs, a short text for the terminal."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel, ConfigDict
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from atropos_client.private_files import replace_private
from local_stack.curve import curve
from local_stack.state import RunState

_CURVE_WIDTH = 60


class Report(BaseModel):
    """What a run achieved; `report.json` holds exactly these keys."""

    model_config = ConfigDict(frozen=True)

    heldout_before: float | None
    """Share of held-out problems answered right before training, 0 .. 1; None if it was not measured."""
    heldout_after: float
    """The same after training, sampled from the inference server with the published weights."""
    publishes_made: int
    """Versions of the weights that were published."""
    publishes_verified: int
    """Published versions that were proven to be served."""
    publish_pause_seconds: float | None
    """Seconds that generation stood still for a publish: the median; None if nothing was published."""
    seconds: float
    """Wall-clock seconds from the start of the command to the end of the last evaluation."""
    seed: int
    model: str
    """The model that training began with: its directory or hub id."""
    steps: int
    """Optimizer steps done."""
    rewards: list[float]
    """Mean score of each step's sequences, in order."""
    final_model: Path
    """Directory of the trained model."""
    machine: dict[str, Any]
    """Where this was measured."""

    def write(self, path: Path) -> None:
        """Write the report as JSON, complete or not at all."""
        replace_private(path, self.model_dump_json(indent=2).encode() + b"\n")


def make_report(state: RunState, *, model: str, heldout_after: float) -> Report:
    """Sum up a finished run."""
    return Report(
        heldout_before=state.heldout_before,
        heldout_after=heldout_after,
        publishes_made=state.publishes_made,
        publishes_verified=state.publishes_verified,
        publish_pause_seconds=state.publish_pause_seconds,
        seconds=round(state.seconds, 1),
        seed=state.seed,
        model=model,
        steps=state.steps_done,
        rewards=[row.reward_mean for row in state.rows if row.reward_mean is not None],
        final_model=state.run_dir / "final",
        machine=describe_machine(),
    )


def describe_machine() -> dict[str, Any]:
    """Return what a measured time depends on."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    """Return the processor's own name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def draw_report(report: Report, *, picture: Path) -> RenderableType:
    """Draw the report for a terminal."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    table.add_row("held-out score", _scores(report))
    if report.rewards:
        line = Text(f"{report.rewards[0]:.2f} ").append(
            curve(report.rewards, width=_CURVE_WIDTH), style="green"
        )
        table.add_row("reward by step", line.append(f" {report.rewards[-1]:.2f}", style="default"))
    table.add_row("published", _publishes(report))
    minutes, seconds = divmod(round(report.seconds), 60)
    table.add_row("time", f"{minutes} min {seconds} s for {report.steps} steps, evaluations included")
    table.add_row("trained model", str(report.final_model))
    table.add_row("picture", str(picture))
    return Panel(
        Group(table),
        title="[bold]Done[/]",
        title_align="left",
        border_style="green",
        padding=(1, 2),
        width=100,
    )


def _scores(report: Report) -> Text:
    before = "unknown" if report.heldout_before is None else f"{report.heldout_before:.1%}"
    return Text(f"{before} → ").append(f"{report.heldout_after:.1%}", style="bold green")


def _publishes(report: Report) -> Text:
    proven = report.publishes_verified == report.publishes_made
    text = f"{report.publishes_made} versions, {report.publishes_verified} proven to be served"
    if report.publish_pause_seconds is not None:
        text += f", generation paused {report.publish_pause_seconds:.2f} s each"
    return Text(text, style="default" if proven else "bold red")

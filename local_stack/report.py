"""The report of a finished run: `report.json` for programs, a short text for the terminal."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel, ConfigDict
from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

_BARS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 60


class Report(BaseModel):
    """Results of a run; `report.json` holds exactly these keys."""

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


def describe_machine() -> dict[str, Any]:
    """Return what a measured time depends on."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
    }


def draw_report(report: Report, *, picture: Path) -> RenderableType:
    """Draw the report for a terminal."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    before = "unknown" if report.heldout_before is None else f"{report.heldout_before:.1%}"
    after = Text(f"{report.heldout_after:.1%}", style="bold green")
    table.add_row("held-out score", Text(f"{before} → ").append(after))
    if report.rewards:
        line = Text(f"{report.rewards[0]:.2f} ").append(curve(report.rewards, width=_CURVE_WIDTH), "green")
        table.add_row("reward by step", line.append(f" {report.rewards[-1]:.2f}"))
    table.add_row("published", _publishes(report))
    minutes, seconds = divmod(round(report.seconds), 60)
    table.add_row("time", f"{minutes} min {seconds} s for {report.steps} steps, evaluations included")
    table.add_row("trained model", str(report.final_model))
    table.add_row("picture", str(picture))
    table.add_row("look at it", f"atropos-train view {picture.parent}")
    title = "[bold]Done[/]"
    return Panel(table, title=title, title_align="left", border_style="green", padding=(1, 2), width=100)


def curve(values: Sequence[float], *, width: int) -> str:
    """Draw `values`, 0 .. 1, as at most `width` bars in one line of text; more values are averaged.

    >>> curve([0.0, 0.5, 1.0], width=10)
    '▁▅█'
    """
    count = min(len(values), width)
    edges = [round(index * len(values) / count) for index in range(count + 1)] if count else []
    means = [sum(values[start:end]) / (end - start) for start, end in pairwise(edges)]
    return "".join(_BARS[min(len(_BARS) - 1, max(0, int(mean * len(_BARS))))] for mean in means)


def _publishes(report: Report) -> Text:
    proven = report.publishes_verified == report.publishes_made
    text = f"{report.publishes_made} versions, {report.publishes_verified} proven to be served"
    if report.publish_pause_seconds is not None:
        text += f", generation paused {report.publish_pause_seconds:.2f} s each"
    return Text(text, style="default" if proven else "bold red")


def _cpu_name() -> str:
    """Return the processor's own name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")

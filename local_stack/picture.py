"""The picture of a run: reward by step, with the held-out scores before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from local_stack.report import Report

_REWARD = "#2a78b8"
_HELD_OUT = "#d1691c"
_AVERAGED_STEPS = 5


def draw_picture(report: Report, path: Path) -> None:
    """Write the picture of `report` to `path` as PNG, 1600 x 900 pixels."""
    figure = Figure(figsize=(8, 4.5), dpi=200, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    steps = range(1, len(report.rewards) + 1)
    faint = axes.plot(steps, report.rewards, "o", color=_REWARD, alpha=0.35, markersize=4)
    faint[0].set(label="reward, each step", clip_on=False)  # the last one lies on the edge
    means = running_mean(report.rewards, _AVERAGED_STEPS)
    axes.plot(steps, means, color=_REWARD, linewidth=2.2, label=f"reward, mean of {_AVERAGED_STEPS} steps")
    last = max(1, report.steps)
    scores = [(0, report.heldout_before, "before"), (last, report.heldout_after, "after")]
    known = [(step, score, when) for step, score, when in scores if score is not None]
    at, heights = [step for step, _, _ in known], [score for _, score, _ in known]
    label = "held-out problems answered right"
    axes.plot(at, heights, "D", color=_HELD_OUT, markersize=8, clip_on=False, zorder=5, label=label)
    for step, score, when in known:
        # Beside the axes, where no curve can cross it; on the left the tick labels are in the way.
        axes.annotate(
            f"{score:.0%} before" if when == "before" else f"{score:.0%}\n{when}",
            (step, score),
            xytext=(12, -12) if when == "before" else (12, 0),
            textcoords="offset points",
            va="center",
            color=_HELD_OUT,
            fontweight="bold",
        )
    axes.set(xlim=(0, last), ylim=(0, 1.05), xlabel="optimizer step", ylabel="score")
    minutes = report.seconds / 60
    title = f"Learning to add · {report.steps} steps in {minutes:.1f} minutes · seed {report.seed}"
    axes.set_title(title, loc="left", fontsize=12, pad=12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    FigureCanvasAgg(figure)  # a canvas without a window, whatever the machine has
    figure.savefig(path, format="png")


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and the `window - 1` before it; of fewer at the beginning."""
    recent = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in recent]

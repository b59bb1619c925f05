"""The picture of a run: reward by step, with the held-out scores before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from local_stack.report import Report

_INK = "#22303c"
_FAINT = "#9aa7b2"
_REWARD = "#2a78b8"
_HELD_OUT = "#d1691c"
_AVERAGED_STEPS = 5


def draw_picture(report: Report, path: Path) -> None:
    """Write the picture of `report` to `path` as PNG, 1600 x 900 pixels."""
    figure = Figure(figsize=(8, 4.5), dpi=200, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    steps = range(1, len(report.rewards) + 1)
    axes.plot(steps, report.rewards, "o", color=_REWARD, alpha=0.35, markersize=4, label="reward, each step")
    axes.plot(
        steps,
        running_mean(report.rewards, _AVERAGED_STEPS),
        color=_REWARD,
        linewidth=2.2,
        label=f"reward, mean of {_AVERAGED_STEPS} steps",
    )
    last = max(1, report.steps)
    scores = [(0, report.heldout_before, "before"), (last, report.heldout_after, "after")]
    known = [(step, score, when) for step, score, when in scores if score is not None]
    axes.plot(
        [step for step, _, _ in known],
        [score for _, score, _ in known],
        "D",
        color=_HELD_OUT,
        markersize=8,
        clip_on=False,
        zorder=5,
        label="held-out problems answered right",
    )
    for step, score, when in known:
        axes.annotate(
            f"{score:.0%} before" if when == "before" else f"{score:.0%}\n{when}",
            (step, score),
            # Beside the axes, where no curve can cross them; on the left the tick labels are in the way.
            xytext=(12, -12) if when == "before" else (12, 0),
            textcoords="offset points",
            va="center",
            color=_HELD_OUT,
            fontweight="bold",
            linespacing=1.1,
        )
    axes.set_xlim(0, last)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("optimizer step", color=_INK)
    axes.set_ylabel("score", color=_INK)
    axes.set_title(
        f"Learning to add · {report.steps} steps in {report.seconds / 60:.1f} minutes · seed {report.seed}",
        loc="left",
        color=_INK,
        fontsize=12,
        pad=12,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.grid(axis="y", color=_FAINT, alpha=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="upper left", fontsize=9, labelcolor=_INK)
    FigureCanvasAgg(figure)  # a canvas without a window, whatever the machine has
    figure.savefig(path, format="png")


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and the `window - 1` before it; of fewer at the beginning."""
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means

"""From raw rows to what a reader wants to know: medians, ratios, and whether the bars are met.

Works on the JSON of a run, so that the report shows what the terminal showed.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

__all__ = [
    "BARS",
    "MOST_DISTURBANCE",
    "MOST_FLOOR",
    "MOST_MEMORY",
    "Bar",
    "Summary",
    "bars_of",
    "disturbance_of",
    "ours_of",
    "summarize",
]

BARS: dict[tuple[str, str], float] = {
    ("a", "float32"): 8.0,
    ("a", "bfloat16"): 7.0,
    ("b", "float32"): 1.6,
    ("b", "bfloat16"): 1.6,
    ("c", "float32"): 9.0,
    ("c", "bfloat16"): 9.0,
}
"""Bar: times as long as ours that the example trainer must take at least, by case and dtype."""
MOST_MEMORY = 0.5
"""Our peak memory, as a share of the example trainer's, at most."""
MOST_FLOOR = 1.15
"""Our time, in times of the floor's, at most."""
MOST_DISTURBANCE = 0.05
"""Share of the machine's cores beyond which other processes are pointed out."""

Run = dict[str, Any]
"""One case in one dtype: case, title, dtype, counts, contenders (the rows of `measure`), ..."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One contender of one run."""

    name: str
    label: str
    status: str
    seconds: float | None
    """Median of its repeats."""
    trained_tokens_per_second: float | None
    computed_tokens: int | None
    peak_gib: float | None
    """Of its first step, above what the process held before."""
    peak_total_gib: float | None
    times_ours: float | None
    """Its seconds over ours: above 1, ours is faster."""
    times_floor: float | None
    gradient_difference: float | None


def ours_of(run: Run) -> dict[str, Any] | None:
    """The first row of ours that was measured: what ratios refer to."""
    for row in run["contenders"]:
        if row["name"].startswith("ours") and row["seconds"]:
            return dict(row)
    return None


def summarize(run: Run) -> list[Summary]:
    """All contenders of a run, in their order."""
    ours = ours_of(run)
    ours_seconds = statistics.median(ours["seconds"]) if ours else None
    floor_seconds = _seconds_of(run, "floor")
    return [_summary(row, run, ours_seconds, floor_seconds) for row in run["contenders"]]


def _summary(row: dict[str, Any], run: Run, ours: float | None, floor: float | None) -> Summary:
    seconds = statistics.median(row["seconds"]) if row["seconds"] else None
    is_step = not row["name"].startswith("floor")
    return Summary(
        name=row["name"],
        label=row["label"],
        status=row["status"],
        seconds=seconds,
        trained_tokens_per_second=run["counts"]["trained_tokens"] / seconds if seconds and is_step else None,
        computed_tokens=row["computed_tokens"],
        peak_gib=_gib(row["peak_bytes"]),
        peak_total_gib=_gib(row["peak_total_bytes"]),
        times_ours=seconds / ours if seconds and ours else None,
        times_floor=seconds / floor if seconds and floor else None,
        gradient_difference=row["gradient_difference"],
    )


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One thing that is promised, and what was found."""

    text: str
    found: str
    met: bool


def bars_of(run: Run) -> list[Bar]:
    """The bars of a run whose contenders were measured, against the example trainer as it ships.

    It recomputes activations; so memory is compared with ours doing the same, where that was measured.
    """
    found = {summary.name: summary for summary in summarize(run) if summary.seconds is not None}
    ours = next((summary for summary in found.values() if summary.name.startswith("ours")), None)
    if ours is None:
        return []
    bars = []
    peer = found.get("example-trainer")
    least = BARS.get((run["case"], run["dtype"]))
    if least is not None and peer is not None and peer.times_ours is not None:
        bars.append(
            Bar(
                text=f"the example trainer takes at least {least:g} times as long",
                found=f"{peer.times_ours:.2f}",
                met=peer.times_ours >= least,
            )
        )
    recomputing = found.get("recomputing")
    lean = recomputing or ours
    if peer is not None and peer.peak_gib and lean.peak_gib is not None:
        share = lean.peak_gib / peer.peak_gib
        both = ", both recomputing activations" if recomputing else ""
        bars.append(
            Bar(
                text=f"at most {MOST_MEMORY:g} of the example trainer's peak memory{both}",
                found=f"{share:.2f}",
                met=share <= MOST_MEMORY,
            )
        )
    if ours.times_floor is not None:
        bars.append(
            Bar(
                text=f"at most {MOST_FLOOR:g} times the floor's time",
                found=f"{ours.times_floor:.2f}",
                met=ours.times_floor <= MOST_FLOOR,
            )
        )
    return bars


def disturbance_of(run: Run) -> float:
    """The largest share of the machine's cores that other processes took during a measured step."""
    return max((max(row["others_share"], default=0.0) for row in run["contenders"]), default=0.0)


def _seconds_of(run: Run, name: str) -> float | None:
    for row in run["contenders"]:
        if row["name"] == name and row["seconds"]:
            return statistics.median(row["seconds"])
    return None


def _gib(peaks: list[int | None]) -> float | None:
    known = [peak for peak in peaks if peak is not None]
    return max(known) / 2**30 if known else None

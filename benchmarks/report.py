"""Writes the tables of docs/performance.md and benchmarks/results/step.md, and the picture, from the results.

    python -m benchmarks.report                 # every file in benchmarks/results/
    python -m benchmarks.report one.json two.json

Only what stands between the pages' markers (`<!-- step -->` to `<!-- /step -->` and so on) is replaced. Where
several files hold the same case, dtype, model and device, the later one counts (files are read by name).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._machine import describe
from benchmarks._picture import draw
from benchmarks.step._summary import MOST_DISTURBANCE, bars_of, disturbance_of, summarize
from benchmarks.step._table import COLUMNS, cells, describe_counts, throughput_lines

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
CASES = RESULTS / "step.md"
PICTURE = ROOT / "docs" / "performance.png"

_COLUMNS = (
    "case",
    "dtype",
    "ours, s",
    "example trainer",
    "not recomputing",
    "plain padding",
    "TRL",
    "ours / floor",
    "memory",
    "bars",
)
"""Of the page's first table."""

Run = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrite pages and picture."""
    options = _parser().parse_args(arguments)
    files = options.files or sorted(RESULTS.glob("*.json"))
    runs = read_runs(files)
    if not runs:
        raise SystemExit(f"no results of benchmarks.step in {', '.join(map(str, files)) or RESULTS}")
    for marker, lines in sections(runs).items():
        page = options.cases if marker == "step" else options.page
        page.write_text(replace_between(page.read_text(encoding="utf-8"), marker, lines), encoding="utf-8")
    draw([run for run in runs if _kind(run) == "step"], options.picture)


def read_runs(files: Sequence[Path]) -> list[Run]:
    """The runs of all files, each with its `machine` beside it; the last of its kind wins."""
    runs: dict[tuple[Any, ...], Run] = {}
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        if result.get("benchmark") != "step":
            continue
        for run in result["runs"]:
            key = (_kind(run), run["case"], run["dtype"], run["model"], run["device"])
            runs[key] = run | {"machine": result["machine"]}
    return [runs[key] for key in sorted(runs, key=lambda key: (key[1], key[2] != "float32", *key[3:]))]


def sections(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Markdown by marker."""
    kinds = ("step", "ablation", "throughput", "gradients")
    of_kind = {kind: [run for run in runs if _kind(run) == kind] for kind in kinds}
    return {
        "summary": _summary(of_kind["step"]),
        "step": [line for run in of_kind["step"] for line in _run(run)],
        "ablation": _ablation(of_kind["ablation"]),
        "gradients": _gradients(of_kind["gradients"])
        or ["Not measured yet since the comparison is with float32."],
        "throughput": [line for run in of_kind["throughput"] for line in _throughput(run)]
        or ["Not measured yet: it needs a GPU, and none was at hand."],
    }


def replace_between(text: str, marker: str, lines: Sequence[str]) -> str:
    """Put `lines` between the two comments of `marker`.

    Raises:
        ValueError: The page has no such pair of comments.
    """
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"the page needs one {start} followed by one {end}")
    block = "\n".join([start, "", *lines, "", end]) if lines else f"{start}\n{end}"
    return pattern.sub(lambda _: block, text)


def _kind(run: Run) -> str:
    if run["optimizer_step"]:
        return "throughput"
    if not any(row["seconds"] for row in run["contenders"]):
        return "gradients"
    ours = [row for row in run["contenders"] if row["name"].startswith("ours")]
    return "ablation" if len(ours) > 1 else "step"


def _summary(runs: Sequence[Run]) -> list[str]:
    """One line a run: our time, the peers' in times of ours, and the floor."""
    if not runs:
        return []
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    for run in runs:
        found = {summary.name: summary for summary in summarize(run)}
        ours = next(summary for summary in found.values() if summary.name.startswith("ours"))
        bars = bars_of(run)
        memory = next((bar.found for bar in bars if "memory" in bar.text), "")
        names = ("example-trainer", "example-trainer-stored", "padding", "trl")
        peers = [found[name].times_ours if name in found else None for name in names]
        row = [
            f"{run['case']}: {run['title']}",
            run["dtype"],
            f"**{ours.seconds:.2f}**" if ours.seconds else ours.status,
            *(_times(value) for value in peers),
            f"{ours.times_floor:.2f}" if ours.times_floor else "",
            memory,
            f"{sum(bar.met for bar in bars)} of {len(bars)} met",
        ]
        lines.append("| " + " | ".join(row) + " |")
    return [*lines, "", f"![Seconds of one step, by case and contender]({PICTURE.name})"]


def _run(run: Run) -> list[str]:
    lines = [
        f"**{run['case']}: {run['title']}, {run['dtype']}.** {describe_counts(run['counts'])}.",
        "",
        *_markdown(run),
        "",
    ]
    lines += [f"- {'met' if bar.met else '**not met**'}: {bar.text}: {bar.found}" for bar in bars_of(run)]
    return [*lines, "", f"{_about(run)}.", ""]


def _markdown(run: Run) -> list[str]:
    return [
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *("| " + " | ".join(cells(summary)) + " |" for summary in summarize(run)),
    ]


def _ablation(runs: Sequence[Run]) -> list[str]:
    if not runs:
        return []
    lines = [
        "| case | dtype | packing | seconds | computed tokens | peak GiB | x the first |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        for summary in summarize(run):
            if not summary.name.startswith("ours"):
                continue
            _, seconds, _, computed, peak, ratio, *_ = cells(summary)
            packing = summary.name.removeprefix("ours").removeprefix("-") or "auto"
            lines.append(
                f"| {run['case']} | {run['dtype']} | {packing} | {seconds} | {computed} | {peak} | {ratio} |"
            )
    return [*lines, "", f"{_about(runs[-1])}."]


def _gradients(runs: Sequence[Run]) -> list[str]:
    """One line a run: how far each contender's gradients are from those in float32."""
    if not runs:
        return []
    labels = list(dict.fromkeys(summary.label for run in runs for summary in summarize(run)))
    lines = ["| case | dtype | " + " | ".join(labels) + " |", "|---" * (len(labels) + 2) + "|"]
    for run in runs:
        found = {summary.label: cells(summary)[-1] for summary in summarize(run)}
        lines.append(
            " | ".join([f"| {run['case']}", run["dtype"], *(found.get(each, "") for each in labels)]) + " |"
        )
    return [*lines, "", f"{describe(runs[-1]['machine'])}."]


def _throughput(run: Run) -> list[str]:
    title = f"**{run['model']}, {run['title']}, {run['dtype']}, on {run['device']}.**"
    return [title, "", *(f"- {line}" for line in throughput_lines(run)), "", f"{_about(run)}.", ""]


def _about(run: Run) -> str:
    repeats = max((len(row["seconds"]) for row in run["contenders"]), default=0)
    spread = [
        max(row["seconds"]) / statistics.median(row["seconds"])
        for row in run["contenders"]
        if row["seconds"] and row["name"].startswith("ours")
    ]
    slowest = f", our slowest repeat {max(spread) - 1:.0%} above our median" if spread else ""
    disturbance = disturbance_of(run)
    disturbed = (
        f"; **disturbed**: other processes took up to {disturbance:.0%} of the cores"
        if disturbance > MOST_DISTURBANCE
        else ""
    )
    return f"{describe(run['machine'])}; medians of {repeats}{slowest}{disturbed}"


def _times(value: float | None) -> str:
    return f"{value:.1f}x" if value else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", type=Path, nargs="*", help=f"default: all of {RESULTS.relative_to(ROOT)}/")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--cases", type=Path, default=CASES, help="the page with every case")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    return parser


if __name__ == "__main__":
    main()

"""The demo's task under the presets of several papers: whole local runs, held-out scores before and after.

    python -m benchmarks.objectives --presets grpo,gspo,cispo,dapo --seeds 0,1,2 --steps 15

Every run is `atropos-train local` with the demo's settings, but for those that a preset decides. A run that
has finished is not run again, so the command may be broken off, or given in two terminals with other seeds
and then once with all. Scores are shares of held-out additions answered right (192 replies),
sampled from the published weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks._machine import describe, machine
from local_stack.command import positive
from local_stack.report import Report

_DECIDED_BY_PRESETS = {"data": ("advantage_estimator", "advantage_normalization"), "loss": ("name",)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what has not run yet, then print the table of all."""
    args = _parser().parse_args(arguments)
    presets, seeds = args.presets.split(","), [int(seed) for seed in args.seeds.split(",")]
    args.runs.mkdir(parents=True, exist_ok=True)
    config = args.runs / "demo-without-objective.yaml"
    config.write_text(yaml.safe_dump(settings_without_objective()), encoding="utf-8")
    for seed in seeds:
        for preset in presets:
            _run(args.runs / f"{preset}-{seed}", config, preset, seed, args.steps)
    reports = {preset: [_report(args.runs / f"{preset}-{seed}") for seed in seeds] for preset in presets}
    about = machine()
    console = Console()
    console.print(tabulate(reports))
    console.print(describe(about), highlight=False)
    if args.json is not None:
        args.json.write_text(
            json.dumps(_record(about, args.steps, reports), indent=1) + "\n", encoding="utf-8"
        )
    if args.picture is not None:
        draw(reports, args.picture)
    return 0


def settings_without_objective() -> dict[str, Any]:
    """Return the demo's settings without those that a preset decides."""
    settings: dict[str, Any] = yaml.safe_load(files("local_stack").joinpath("demo.yaml").read_text())
    for section, names in _DECIDED_BY_PRESETS.items():
        for name in names:
            del settings[section][name]
    return {section: values for section, values in settings.items() if values}


def tabulate(reports: dict[str, list[Report]]) -> Table:
    """Lay out one row a preset."""
    table = Table(
        "preset", "held-out after, by seed", "mean", "mean reward of steps 11 to 15", "publishes proven"
    )
    for preset, runs in reports.items():
        table.add_row(
            preset,
            ", ".join(f"{run.heldout_after:.1%}" for run in runs),
            f"{fmean(run.heldout_after for run in runs):.1%}",
            f"{fmean(fmean(run.rewards[-5:]) for run in runs):.3f}",
            f"{sum(run.publishes_verified for run in runs)} of {sum(run.publishes_made for run in runs)}",
        )
    return table


def draw(reports: dict[str, list[Report]], path: Path) -> None:
    """Draw the reward of each step, one panel a preset and one line a seed, as a PNG."""
    figure = Figure(figsize=(10.0, 2.8), dpi=160, layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(reports), sharey=True, squeeze=False)[0]
    for axes, (preset, runs) in zip(panels, reports.items(), strict=True):
        for run in runs:
            steps = range(1, len(run.rewards) + 1)
            axes.plot(
                steps, run.rewards, linewidth=1.5, label=f"seed {run.seed}: {run.heldout_after:.0%} held out"
            )
        axes.set_title(preset, loc="left", fontsize=10)
        axes.set(xlabel="optimizer step", ylim=(0, 1.05))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.legend(frameon=False, fontsize=7, loc="lower right")
    panels[0].set_ylabel("reward")
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png")


def _run(directory: Path, config: Path, preset: str, seed: int, steps: int) -> None:
    if (directory / "report.json").exists():
        return
    words = ["local", "--config", str(config), "--run-dir", str(directory), "--seed", str(seed)]
    words += ["--steps", str(steps), "--loss.preset", preset]
    subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-m", "trainer.cli", *words], check=True
    )


def _report(directory: Path) -> Report:
    return Report.model_validate_json((directory / "report.json").read_bytes())


def _record(about: dict[str, Any], steps: int, reports: dict[str, list[Report]]) -> dict[str, Any]:
    shown = {
        "seed",
        "steps",
        "heldout_before",
        "heldout_after",
        "publishes_made",
        "publishes_verified",
        "rewards",
    }
    return {
        "benchmark": "objectives",
        "machine": about,
        "steps": steps,
        "runs": {preset: [run.model_dump(include=shown) for run in runs] for preset, runs in reports.items()},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.objectives",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--presets", default="grpo,gspo,cispo,dapo", help="values of loss.preset")
    add("--seeds", default="0,1,2")
    add("--steps", type=positive, default=15, help="optimizer steps of a run")
    add("--runs", type=Path, default=Path("runs/objectives"), help="where the runs are, one directory each")
    add("--json", type=Path, help="also write the numbers here")
    add("--picture", type=Path, help="also draw the curves here, as a PNG")
    return parser


if __name__ == "__main__":
    sys.exit(main())

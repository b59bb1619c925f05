"""What a user sees while a run goes on and at its end."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from local_stack.display import Display
from local_stack.picture import draw_picture, running_mean
from local_stack.records import RunRecords
from local_stack.report import Report, curve, describe_machine, draw_report


def write(run_dir: Path, kind: str, number: int, **values: object) -> None:
    """Append a row as the trainer writes it."""
    row = {"kind": kind, "step": number, "version": number, "policy_version": number}
    row |= {"reward_mean": number / 10, "loss": -0.0125, "tokens_per_second": 212.4}
    row |= {"publish_seconds": 1.84, "publish_pause_seconds": 0.52, "publish_verified": True, **values}
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def make_console(*, is_terminal: bool = False) -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    return Console(file=output, width=200, force_terminal=is_terminal, color_system=None), output


def show_a_run(run_dir: Path, console: Console) -> None:
    """Two steps with their publishes; `update` is called more often than there is something new."""
    records = RunRecords(run_dir)

    def update() -> None:
        for _ in range(2):
            records.read_new()
            display.update(records)

    with Display(console, steps=30) as display:
        display.enter("starting")
        display.enter("starting")
        update()
        evaluation = run_dir / "evaluations" / "before"
        evaluation.mkdir(parents=True)
        (evaluation / "metrics.json").write_text(json.dumps({"results": {"all": {"accuracy": 0.125}}}))
        display.enter("training")
        write(run_dir, "step", 1)
        update()
        write(run_dir, "publish", 1)
        write(run_dir, "step", 2, reward_mean=None)
        update()
        write(run_dir, "publish", 2, publish_verified=False)
        display._drawn_at = 0.0  # half a second has gone by
        update()


def test_a_pipe_gets_every_event_once_and_nothing_else(tmp_path: Path) -> None:
    console, output = make_console()
    show_a_run(tmp_path, console)
    lines = [line.partition("] ")[2] for line in output.getvalue().splitlines()]
    assert lines == [
        "starting",
        "training",
        "held-out score before training: 12.5%",
        "step 1/30  reward 0.100  loss -0.0125  212 tokens/s",
        "step 2/30  loss -0.0125  212 tokens/s",
        "version 1 published in 1.8 s  paused 0.5 s  verified",
        "version 2 published in 1.8 s  paused 0.5 s  NOT VERIFIED",
    ]


def test_a_terminal_gets_the_same_lines_above_a_bar_that_goes_away(tmp_path: Path) -> None:
    console, output = make_console(is_terminal=True)
    show_a_run(tmp_path, console)
    text = output.getvalue()
    assert text.count("step 1/30  reward 0.100  loss -0.0125  212 tokens/s") == 1
    assert "NOT VERIFIED" in text
    bars = [line for line in text.splitlines() if "━" in line]
    assert "training" in bars[-1]
    assert "2/30" in bars[-1]
    assert text.rstrip().endswith("\x1b[2K")  # erased


@pytest.mark.parametrize(
    ("values", "width", "text"),
    [
        ([], 10, ""),
        ([0.0, 0.5, 1.0], 10, "▁▅█"),
        ([-1.0, 2.0], 10, "▁█"),
        ([0.0, 0.0, 1.0, 1.0], 2, "▁█"),
        ([0.5] * 1000, 7, "▅" * 7),
    ],
)
def test_a_curve_is_one_bar_a_value_and_never_wider_than_asked(
    values: list[float], width: int, text: str
) -> None:
    assert curve(values, width=width) == text


def report(**values: object) -> Report:
    measured: dict[str, object] = {
        "heldout_before": 0.125,
        "heldout_after": 0.75,
        "publishes_made": 5,
        "publishes_verified": 5,
        "publish_pause_seconds": 0.52,
        "seconds": 402.3,
        "seed": 3,
        "model": "/models/demo",
        "steps": 5,
        "rewards": [0.1, 0.2, 0.3, 0.4, 0.5],
        "final_model": "runs/x/final",
        "machine": describe_machine(),
    }
    return Report.model_validate(measured | values)


def shown(what: Report) -> str:
    console, output = make_console()
    console.print(draw_report(what, picture=Path("runs/x/report.png")))
    return output.getvalue()


def test_the_terminal_report_says_what_was_reached_and_where_it_lies() -> None:
    text = shown(report())
    for part in (
        "12.5% → 75.0%",
        "0.10 ▁▂▃▄▅ 0.50",
        "5 versions, 5 proven to be served, generation paused 0.52 s each",
        "6 min 42 s for 5 steps",
        "runs/x/final",
        "runs/x/report.png",
    ):
        assert part in text
    assert report().machine["cpu_cores"] >= 1


def test_the_terminal_report_of_a_resumed_run_may_lack_the_first_score() -> None:
    assert "unknown → 75.0%" in shown(report(heldout_before=None))


@pytest.mark.parametrize("changed", [{}, {"heldout_before": None, "rewards": [], "steps": 0}])
def test_the_picture_is_drawn_for_short_and_incomplete_runs_too(
    tmp_path: Path, changed: dict[str, object]
) -> None:
    path = tmp_path / "report.png"
    draw_picture(report(**changed), path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (1600, 900)
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 20) or []) > 10


def test_the_last_point_of_the_picture_is_not_cut_by_the_frame(tmp_path: Path) -> None:
    path = tmp_path / "report.png"
    draw_picture(report(rewards=[0.2, 0.2, 0.8, 0.2, 0.2, 0.2, 0.2, 0.8], steps=8), path)
    with Image.open(path) as image:
        pixels = image.convert("RGB").load()
    assert pixels is not None
    widths = []
    for y in range(400):  # the upper half, where no line runs
        row = "".join("x" if pixels[x, y][2] - pixels[x, y][0] > 20 else " " for x in range(1600))
        widths.append([len(run) for run in row.split()])
    # The two points at 0.8 are alone in their rows, and of one width.
    inner, last = max(found for found in widths if len(found) == 2)
    assert inner == pytest.approx(last, abs=1)


def test_the_running_mean_uses_what_there_is_at_the_beginning() -> None:
    assert running_mean([1.0, 3.0, 5.0, 7.0], window=2) == [1.0, 2.0, 4.0, 6.0]

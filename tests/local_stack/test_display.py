"""What a user sees while a run goes on and at its end."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from local_stack.curve import curve
from local_stack.display import LineDisplay, PanelDisplay, draw_panel, make_display
from local_stack.picture import draw_picture, running_mean
from local_stack.records import PublishRow, StepRow
from local_stack.report import Report, draw_report, make_report
from local_stack.state import RunState


def step(number: int, **values: object) -> StepRow:
    measured = {
        "policy_version": number,
        "reward_mean": number / 10,
        "loss": -0.0125,
        "tokens_per_second": 212.4,
    }
    return StepRow.model_validate({"step": number, **measured, **values})


def publish(version: int, **values: object) -> PublishRow:
    measured = {"publish_seconds": 1.84, "publish_pause_seconds": 0.52, "publish_verified": True}
    return PublishRow.model_validate({"version": version, **measured, **values})


def state(rows: int = 0, **values: object) -> RunState:
    made = RunState(model="demo", steps=30, seed=3, run_dir=Path("runs/x"))
    made.rows = [step(number) for number in range(1, rows + 1)]
    made.publishes = [publish(number) for number in range(1, rows + 1)]
    for name, value in values.items():
        setattr(made, name, value)
    return made


def shown(what: object, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


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


def test_the_panel_of_a_run_that_starts_says_what_is_being_done() -> None:
    text = shown(
        draw_panel(state(phase="starting", services={"Atropos API": "starting", "trainer": "starting"}))
    )
    for part in ("demo", "seed 3", "runs/x", "starting", "○ Atropos API", "○ trainer", "0/30"):
        assert part in text


def test_the_panel_of_a_run_in_training_shows_every_number_asked_for() -> None:
    text = shown(draw_panel(state(3, phase="training", heldout_before=0.146, services={"trainer": "ready"})))
    for part in (
        "● trainer",
        "3/30",
        "14.6% before training",
        "0.300",
        "▁▂▃",
        "-0.0125",
        "212 tokens/s",
        "version 3 in 1.8 s, paused 0.5 s",
        "✓ 3 of 3 proven served",
    ):
        assert part in text


def test_the_panel_does_not_hide_a_publish_that_was_not_proven() -> None:
    run = state(2)
    run.publishes.append(publish(3, publish_verified=False))
    assert "✗ 2 of 3 proven served" in shown(draw_panel(run))


def test_a_step_whose_publish_has_not_ended_is_not_counted_as_published() -> None:
    run = state(1)
    run.rows.append(step(2))
    assert (run.publishes_made, run.publishes_verified) == (1, 1)
    assert "version 1 in 1.8 s" in shown(draw_panel(run))


def test_the_pause_of_the_report_is_the_median() -> None:
    run = state()
    assert run.publish_pause_seconds is None
    run.publishes = [publish(number, publish_pause_seconds=number) for number in (1, 2, 9)]
    assert run.publish_pause_seconds == 2


def test_a_terminal_gets_the_panel_and_a_pipe_gets_lines() -> None:
    assert isinstance(make_display(Console(file=io.StringIO(), force_terminal=True)), PanelDisplay)
    assert isinstance(make_display(Console(file=io.StringIO(), force_terminal=False)), LineDisplay)


def test_lines_say_everything_once() -> None:
    console = Console(file=io.StringIO(), width=200)
    run = state(phase="starting")
    with make_display(console) as display:
        display.update(run)
        display.update(run)
        run.heldout_before = 0.125
        run.phase = "training"
        run.rows = [step(1)]
        display.update(run)
        run.rows = [step(1), step(2)]
        run.publishes = [publish(1)]
        display.update(run)
        run.publishes = [publish(1), publish(2, publish_verified=False)]
        display.update(run)
    assert isinstance(console.file, io.StringIO)
    lines = [line.partition("] ")[2] for line in console.file.getvalue().splitlines()]
    assert lines == [
        "starting",
        "training",
        "held-out score before training: 12.5%",
        "step 1/30  reward 0.100  loss -0.0125  212 tokens/s",
        "step 2/30  reward 0.200  loss -0.0125  212 tokens/s",
        "version 1 published in 1.8 s  paused 0.5 s  verified",
        "version 2 published in 1.8 s  paused 0.5 s  NOT VERIFIED",
    ]


def test_the_time_left_is_estimated_from_the_steps_of_this_session() -> None:
    run = state(2)
    assert run.seconds_left is None
    run.training_since = (run.started_at - 100.0, 2)
    assert run.seconds_left is None
    run.rows = [step(number) for number in range(1, 13)]
    assert run.seconds_left == pytest.approx(10.0 * 18, rel=0.1)


def report(**values: object) -> Report:
    made = make_report(state(5, heldout_before=0.125), model="/models/demo", heldout_after=0.75)
    return made.model_copy(update=values)


def test_the_report_sums_the_run_up_and_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report().write(path)
    written = json.loads(path.read_text())
    expected = {
        "heldout_before": 0.125,
        "heldout_after": 0.75,
        "publishes_made": 5,
        "publishes_verified": 5,
        "publish_pause_seconds": 0.52,
        "seed": 3,
        "steps": 5,
        "model": "/models/demo",
        "final_model": "runs/x/final",
        "rewards": [0.1, 0.2, 0.3, 0.4, 0.5],
    }
    assert {key: written[key] for key in expected} == expected
    assert written["seconds"] >= 0
    assert written["machine"]["cpu_cores"] >= 1
    assert list(tmp_path.iterdir()) == [path]


def test_the_terminal_report_says_what_was_reached_and_where_it_lies() -> None:
    text = shown(draw_report(report(seconds=402.3), picture=Path("runs/x/report.png")))
    for part in (
        "12.5% → 75.0%",
        "▁▂▃▄▅",
        "5 versions, 5 proven to be served, generation paused 0.52 s each",
        "6 min 42 s for 5 steps",
        "runs/x/final",
        "runs/x/report.png",
    ):
        assert part in text


def test_the_terminal_report_of_a_resumed_run_may_lack_the_first_score() -> None:
    assert "unknown → 75.0%" in shown(draw_report(report(heldout_before=None), picture=Path("p.png")))


@pytest.mark.parametrize(
    "changed", [{}, {"heldout_before": None}, {"rewards": [0.5], "steps": 1}, {"rewards": []}]
)
def test_the_picture_is_drawn_for_short_and_incomplete_runs_too(
    tmp_path: Path, changed: dict[str, object]
) -> None:
    path = tmp_path / "report.png"
    draw_picture(report(**changed), path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (1600, 900)
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 20) or []) > 10


def test_the_running_mean_uses_what_there_is_at_the_beginning() -> None:
    assert running_mean([1.0, 3.0, 5.0, 7.0], window=2) == [1.0, 2.0, 4.0, 6.0]

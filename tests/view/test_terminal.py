"""The overview in a terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.view.made_run import make_run, step_row, write_metrics
from trainer.cli import main
from trainer.view.terminal import spark


def test_the_overview_shows_the_run_and_obeys_nothing_that_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    health = {"status": "ok", "phase": "training\x1b[31m", "waiting_for": "[red]x[/]\n", "time": 1e12}
    (run / "health.json").write_text(json.dumps(health))
    write_metrics(run, [step_row(6, reward_mean=0.75, waiting_seconds=3.0)])
    assert main(["view", "--terminal", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "step 6 of 100" in shown
    assert "training\\x1b[31m, waiting for [red]x[/]\\n" in shown
    assert "0.75" in shown
    assert "waiting 3.0 s" in shown
    assert "version 5, proven" in shown
    assert "5 trained" in shown
    assert "\n╭─ curves" in shown  # each part begins a line of its own


def test_bars_lie_between_the_lowest_and_the_highest() -> None:
    assert spark([0.0, None, 1.0, 0.5]) == "▁ █▅"
    assert spark([None]) == ""
    assert spark([2.0, 2.0]) == "▁▁"

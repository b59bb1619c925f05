"""The parts of benchmarks/gpu/run.sh that are only there, on the CPU with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from benchmarks.gpu import casting, profile


def test_a_profile_lists_the_operators_of_a_whole_step(capfd: pytest.CaptureFixture[str]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # the mixed precision is fixed once a process
    words = ["--device", "cpu", "--model", "tiny", "--case", "tiny", "--micro-batch-tokens", "256"]
    assert profile.main(words) == 0
    shown = capfd.readouterr().out
    assert "Optimizer.step#AdamW.step" in shown
    assert "_TiledScoresBackward" in shown
    AcceleratorState._reset_state(reset_partial_state=True)


def test_casting_measures_both_ways_over_all_weights(tmp_path: Path) -> None:
    path = tmp_path / "casting.json"
    assert casting.main(["--device", "cpu", "--model", "tiny", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["bytes"] > 0
    assert set(record["results"]) == {"stream, in buckets", "at once"}
    assert all(row["seconds"] > 0 for rows in record["results"].values() for row in rows)

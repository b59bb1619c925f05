"""The benchmark of how evenly steps are shared out; some of its figures are promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.balance import main


def test_mathematics_on_64_processes_is_as_even_as_promised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "balance.json"
    result = main(["--cases", "math 64 x 8", "--processes", "1", "64", "--batches", "1", "--json", str(file)])
    assert json.loads(file.read_text()) == result
    alone, _, replicated, lock_step = result["rows"]
    assert alone["planners"].keys() == {"whole groups", "pieces", "chosen"}
    assert replicated["planners"]["chosen"] <= 1.05
    assert lock_step["planners"]["chosen"] <= 1.15
    for row in result["rows"]:
        assert row["planners"]["chosen"] <= min(row["planners"].values()) / 0.99**2
        assert row["planners"]["chosen"] >= row["bound"] >= 1
    assert "math 64 x 8" in capsys.readouterr().out

"""The parts of benchmarks/gpu/run.sh that are only there, on the CPU with a tiny model."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import casting, profile
from tests.compose import ROOT


def test_the_script_gives_each_part_words_that_it_takes(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "benchmarks/gpu/run.sh"), str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHON": "echo"}, capture_output=True, text=True, check=True, timeout=60
    )
    parts = [line.split() for line in done.stdout.splitlines() if line.startswith("-m ")]
    assert len(parts) == 4
    for _, name, *words in parts:
        module: Any = importlib.import_module({"benchmarks.step": "benchmarks.step.__main__"}.get(name, name))
        module._parser().parse_args(words)
    limits = re.findall(r"^part \w+ (\d+)", Path(command[1]).read_text(), re.MULTILINE)
    assert sum(map(int, limits)) <= 8 * 60


def test_a_profile_lists_the_operators_of_a_whole_step(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--model", "tiny", "--case", "tiny", "--micro-batch-tokens", "256"]
    assert profile.main(words) == 0
    shown = capfd.readouterr().out
    assert "Optimizer.step#AdamW.step" in shown
    assert "_TiledScoresBackward" in shown


def test_casting_measures_both_ways_over_all_weights(tmp_path: Path) -> None:
    path = tmp_path / "casting.json"
    assert casting.main(["--device", "cpu", "--model", "tiny", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["bytes"] > 0
    assert set(record["results"]) == {"stream, in buckets", "at once"}
    assert all(row["seconds"] > 0 for rows in record["results"].values() for row in rows)

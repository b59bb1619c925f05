"""Checkpoints: whole or not at all, readable by everybody, and never trusted blindly."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer.batches import make_bodies
from tests.trainer.runs import assert_equal_tensors, rows, run, weights
from trainer.checkpoint import read_checkpoint
from trainer.checkpoint_store import list_checkpoints
from trainer.config import load_config
from trainer.errors import CheckpointError, ConfigurationError
from trainer.manifest import read_manifest


def test_the_model_part_is_an_ordinary_directory(tiny_model_directory: Path, tmp_path: Path) -> None:
    run(tiny_model_directory, tmp_path, make_bodies(2), steps=2)
    checkpoint = read_checkpoint(tmp_path / "checkpoints/step-000002")
    AutoModelForCausalLM.from_pretrained(checkpoint.model_path)
    AutoTokenizer.from_pretrained(checkpoint.model_path)
    assert checkpoint.state.policy_version == 2
    assert checkpoint.manifest is not None
    assert checkpoint.manifest.configuration["train"]["steps"] == 2


def test_only_the_newest_are_kept(tiny_model_directory: Path, tmp_path: Path) -> None:
    keep = ("--checkpoint.every", "1", "--checkpoint.keep", "2")
    run(tiny_model_directory, tmp_path, make_bodies(4), *keep)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == [
        "step-000003",
        "step-000004",
    ]


def test_every_further_one_is_kept_as_well(tiny_model_directory: Path, tmp_path: Path) -> None:
    keep = ("--checkpoint.every", "1", "--checkpoint.keep", "1", "--checkpoint.keep_every", "2")
    run(tiny_model_directory, tmp_path, make_bodies(5), *keep, steps=5)
    names = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-000002", "step-000004", "step-000005"]


def test_keeping_what_is_never_written_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="keep_every 75 is not a multiple of every"):
        load_config(None, ["--model.path", "m", "--checkpoint.keep_every", "75"], environment={})


def test_a_checkpoint_of_format_1_still_resumes(tiny_model_directory: Path, tmp_path: Path) -> None:
    run(tiny_model_directory, tmp_path / "new", make_bodies(4))
    run(tiny_model_directory, tmp_path / "old", make_bodies(2), steps=2)
    path = tmp_path / "old/checkpoints/step-000002"
    (path / "manifest.json").unlink()
    state = json.loads((path / "state.json").read_text())
    state |= {"format": 1, "configuration": {}, "versions": {}}
    (path / "state.json").write_text(json.dumps(state))
    run(tiny_model_directory, tmp_path / "old", make_bodies(2, first_seed=2))
    assert_equal_tensors(weights(tmp_path / "old/final"), weights(tmp_path / "new/final"))


def test_secrets_are_masked_in_the_manifest(tiny_model_directory: Path, tmp_path: Path) -> None:
    run(tiny_model_directory, tmp_path, make_bodies(1), "--atropos.token", "hush-hush", steps=1)
    for file in (tmp_path / "checkpoints/step-000001").rglob("*"):
        assert file.is_dir() or b"hush-hush" not in file.read_bytes()


def test_a_checkpoint_names_the_libraries_that_run_not_those_installed_meanwhile(
    tiny_model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bodies() -> Iterator[bytes]:
        first, second = make_bodies(2)
        yield first
        newer = tmp_path / "installed/torch-99.0.dist-info"
        newer.mkdir(parents=True)
        (newer / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 99.0\n")
        monkeypatch.syspath_prepend(newer.parent)
        assert importlib.metadata.version("torch") == "99.0"
        yield second

    before = importlib.metadata.version("torch")
    summary = run(tiny_model_directory, tmp_path / "run", bodies(), steps=2)
    assert read_manifest(summary.checkpoint).versions["torch"] == before


def test_resuming_with_other_adapters_is_refused(tiny_model_directory: Path, tmp_path: Path) -> None:
    run(tiny_model_directory, tmp_path, make_bodies(1), steps=1)
    with pytest.raises(CheckpointError, match="holds no adapters"):
        run(tiny_model_directory, tmp_path, make_bodies(2), "--model.lora.rank", "4", steps=2)


def test_a_metrics_line_cut_off_by_a_crash_is_dropped_on_resume(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    run(tiny_model_directory, tmp_path, make_bodies(2), steps=2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 3, "loss": 0.1}\n{"kind": "step", "st')
    run(tiny_model_directory, tmp_path, make_bodies(1), steps=3)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    assert rows(tmp_path)[2]["loss"] != 0.1


def newest_step(output: Path) -> int:
    checkpoints = list_checkpoints(output / "checkpoints")
    return int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else -1


CHILD = """
import sys
from pathlib import Path
from tests.trainer.batches import make_bodies
from tests.trainer.runs import run
run(Path(sys.argv[1]), Path(sys.argv[2]), make_bodies(400), "--checkpoint.every", "1", steps=400)
"""


@pytest.mark.slow
def test_a_run_killed_at_any_moment_leaves_a_checkpoint_that_resumes(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    seen = 0
    for delay in (0.6, 0.25, 0.4):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tiny_model_directory), str(tmp_path)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(Path.cwd())},
        )
        try:
            deadline = time.monotonic() + 60
            while newest_step(tmp_path) <= seen and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(delay)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        newest = read_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])
        assert newest.state.step > seen
        seen = newest.state.step
    summary = run(tiny_model_directory, tmp_path, make_bodies(1), steps=seen + 1)
    assert summary.step == seen + 1

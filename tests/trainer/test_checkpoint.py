"""Checkpoints: whole or not at all, readable by everybody, and never trusted blindly."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer.batches import make_bodies
from tests.trainer.runs import rows, run
from trainer.checkpoints.format import read_checkpoint
from trainer.checkpoints.manifest import read_manifest
from trainer.checkpoints.retention import list_checkpoints


def test_the_model_part_is_an_ordinary_directory(tiny_model_directory: Path, tmp_path: Path) -> None:
    run(tiny_model_directory, tmp_path, make_bodies(2), steps=2)
    checkpoint = read_checkpoint(tmp_path / "checkpoints/step-000002")
    AutoModelForCausalLM.from_pretrained(checkpoint.path / "model")
    AutoTokenizer.from_pretrained(checkpoint.path / "model")
    assert checkpoint.state.policy_version == 2
    assert checkpoint.manifest.configuration["train"]["steps"] == 2


def test_every_further_one_is_kept_as_well(tiny_model_directory: Path, tmp_path: Path) -> None:
    keep = ("--checkpoint.every", "1", "--checkpoint.keep", "1", "--checkpoint.keep_every", "2")
    run(tiny_model_directory, tmp_path, make_bodies(5), *keep, steps=5)
    names = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-000002", "step-000004", "step-000005"]


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


def test_a_metrics_line_cut_off_by_a_crash_is_dropped_on_resume(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    run(tiny_model_directory, tmp_path, make_bodies(2), steps=2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 3, "loss": 0.1}\n{"kind": "step", "st')
    run(tiny_model_directory, tmp_path, make_bodies(1), steps=3)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    assert rows(tmp_path)[2]["loss"] != 0.1


def test_lines_that_are_no_rows_are_moved_aside_on_resume(
    tiny_model_directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tiny_model_directory, tmp_path, make_bodies(2), steps=2)
    no_rows = [b'{"kind": "step", "step": 1, "reason": "\xff"}', b'{"kind": "step", "step": null}', b"[1]"]
    groups = [b'{"batxh": 1, "reason": "x"}', b'{"batch": "1"}']
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.writelines(line + b"\n" for line in no_rows)
    (tmp_path / "set_aside").mkdir()
    (tmp_path / "set_aside/groups.jsonl").write_bytes(b"\n".join([*groups, b'{"batch": 1}', b""]))
    (tmp_path / "set_aside/groups-000001.jsonl").mkdir()
    run(tiny_model_directory, tmp_path, make_bodies(1), steps=3)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl.unreadable").read_bytes().splitlines() == no_rows
    assert (tmp_path / "set_aside/groups.jsonl").read_bytes() == b'{"batch": 1}\n'
    assert (tmp_path / "set_aside/groups.jsonl.unreadable").read_bytes().splitlines() == groups
    assert "metrics.jsonl: moved 3 lines, no rows, to" in caplog.text

"""What a run wrote down, read while it is being written."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from local_stack.records import RunRecords, newest_checkpoint, read_accuracy


def line(step: int, kind: str = "step", **values: object) -> str:
    return json.dumps({"kind": kind, "step": step, **values}) + "\n"


def test_a_run_that_has_not_begun_has_no_steps(tmp_path: Path) -> None:
    records = RunRecords(tmp_path)
    assert not records.read_new()
    assert records.steps == []


def test_new_steps_are_noticed_and_all_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = RunRecords(tmp_path)
    path.write_text(line(1, reward_mean=0.25) + line(1, kind="skipped", reason="no signal"))
    assert records.read_new()
    assert [row.step for row in records.steps] == [1]
    assert not records.read_new()
    with path.open("a") as file:
        file.write(line(2, reward_mean=0.5))
    assert records.read_new()
    assert [row.reward_mean for row in records.steps] == [0.25, 0.5]


def publish_line(version: int, **values: object) -> str:
    measured = {"publish_seconds": 2.0, "publish_pause_seconds": 0.5, "publish_verified": True, **values}
    return line(version, kind="publish", version=version, **measured)


def test_publishes_are_kept_by_version_the_last_one_of_each(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = RunRecords(tmp_path)
    path.write_text(publish_line(0) + line(1) + line(2) + publish_line(1) + line(3) + publish_line(2))
    assert records.read_new()
    assert [row.step for row in records.steps] == [1, 2, 3]
    assert [row.version for row in records.publishes] == [1, 2]
    with path.open("a") as file:
        file.write(publish_line(2, publish_pause_seconds=0.25))
    assert not records.read_new()
    assert [row.publish_pause_seconds for row in records.publishes] == [0.5, 0.25]


def test_a_line_counts_once_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = RunRecords(tmp_path)
    whole = line(1, loss=-0.5)
    path.write_text(whole[:12])
    assert not records.read_new()
    with path.open("a") as file:
        file.write(whole[12:])
    assert records.read_new()
    assert [row.loss for row in records.steps] == [-0.5]


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = RunRecords(tmp_path)
    path.write_text(line(1) + line(2) + publish_line(2) + line(3))
    records.read_new()
    shorter = tmp_path / "metrics.partial"
    shorter.write_text(line(1))
    shorter.replace(path)
    assert records.read_new()
    assert [row.step for row in records.steps] == [1]
    assert records.publishes == []


@pytest.mark.parametrize("bad", ["not json\n", "[1]\n", '{"kind": "step", "step": "one"}\n'])
def test_a_line_that_cannot_be_read_is_logged_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + bad + line(2))
    records = RunRecords(tmp_path)
    with caplog.at_level(logging.WARNING):
        records.read_new()
    assert [row.step for row in records.steps] == [1, 2]
    assert "cannot be read" in caplog.text


def test_accuracy_is_read_once_the_evaluation_has_written_it(tmp_path: Path) -> None:
    assert read_accuracy(tmp_path) is None
    written = json.dumps({"results": {"all": {"accuracy": 0.146}}})
    (tmp_path / "metrics.json").write_text(written[:20])
    assert read_accuracy(tmp_path) is None
    (tmp_path / "metrics.json").write_text(written)
    assert read_accuracy(tmp_path) == 0.146


def test_the_newest_checkpoint_is_the_one_with_the_highest_step(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for name in ("step-000009", "step-000010", ".step-000011.partial", "step-000012.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-000010"

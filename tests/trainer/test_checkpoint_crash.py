"""A crash at any moment, and a disk that is full: the newest whole checkpoint is there, or the one before."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.forked import run_module
from trainer.checkpoints.format import verify_checkpoint
from trainer.checkpoints.retention import list_checkpoints
from trainer.export.atomic_directory import atomic_directory


def crash(model: Path, directory: Path, scenario: str) -> str:
    """Run a scenario, and return what it printed."""
    done = run_module("tests.trainer.checkpoint_crashes", model, directory, scenario, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("scenario", ["next", "replace", "recover"])
def test_a_writer_killed_at_a_file_system_call_leaves_the_new_checkpoint_or_the_old_one(
    scenario: str, tiny_model_directory: Path, tmp_path: Path
) -> None:
    printed = crash(tiny_model_directory, tmp_path, scenario)
    *killed, finished = [line.split() for line in printed.splitlines()]
    assert finished[1:] == ["0", "2"]
    assert len(killed) >= 20
    assert {status for _, status, _ in killed} == {str(int(signal.SIGKILL))}
    found = [int(number) for _, _, number in killed]
    assert found == sorted(found), "once the new one is there, it stays"
    assert found[0] == 1
    assert set(found) <= {1, 2}


def test_what_was_moved_out_of_the_way_is_not_lost_if_the_next_writer_fails(tmp_path: Path) -> None:
    retired = tmp_path / ".out.retired-1"
    retired.mkdir()
    (retired / "file").write_text("old")
    with pytest.raises(OSError, match="full"), atomic_directory(tmp_path / "out", replace=True):
        raise OSError("full")
    assert (tmp_path / "out/file").read_text() == "old"


@pytest.mark.parametrize("limit", [5_000, 20_000, 150_000])
def test_a_full_disk_ends_the_run_with_a_message_and_the_checkpoint_before_stays(
    limit: int, tiny_model_directory: Path, tmp_path: Path
) -> None:
    printed = crash(tiny_model_directory, tmp_path, f"full disk {limit}")
    assert "cannot write" in printed
    assert "File too large" in printed
    (path,) = list_checkpoints(tmp_path / "checkpoints")[-1:]
    assert verify_checkpoint(path).state.step == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name[0] == "."] == []

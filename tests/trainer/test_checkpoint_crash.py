"""A crash at any moment, and a disk that is full: the newest whole checkpoint is there, or the one before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.atomic_directory import atomic_directory
from trainer.checkpoint import verify_checkpoint
from trainer.checkpoint_store import list_checkpoints

ROOT = Path(__file__).parents[2]


def run_python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("scenario", ["next", "replace", "recover"])
def test_a_writer_killed_at_any_file_system_call_leaves_the_new_checkpoint_or_the_old_one(
    scenario: str, tiny_model_directory: Path, tmp_path: Path
) -> None:
    done = run_python(
        "-m", "tests.trainer.checkpoint_crashes", str(tiny_model_directory), str(tmp_path), scenario
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    *killed, finished = [line.split() for line in done.stdout.splitlines()]
    assert finished[1:] == ["0", "2"]
    assert len(killed) >= 40
    assert {status for _, status, _ in killed} == {str(int(signal.SIGKILL))}
    found = [int(number) for _, _, number in killed]
    assert found == sorted(found), "once the new one is there, it stays"
    assert set(found) == {1, 2}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_writers_killed_after_random_times_never_lose_a_checkpoint(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    done = run_python(
        "-m", "tests.trainer.checkpoint_crashes", str(tiny_model_directory), str(tmp_path), "random"
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 40
    assert int(lines[-1][2]) > 10, "most children lived long enough to write"


def test_what_was_moved_out_of_the_way_is_not_lost_if_the_next_writer_fails(tmp_path: Path) -> None:
    retired = tmp_path / ".out.retired-1"
    retired.mkdir()
    (retired / "file").write_text("old")
    with pytest.raises(OSError, match="full"), atomic_directory(tmp_path / "out", replace=True):
        raise OSError("full")
    assert (tmp_path / "out/file").read_text() == "old"


# A limit on the size of files refuses a write in the middle of a file, as a full disk does.
FULL_DISK = """
import resource, sys
from pathlib import Path
from tests.trainer.batches import make_bodies
from trainer.errors import CheckpointError, MetricsError
from tests.trainer.runs import run
model, output, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
bodies = make_bodies(4)
def fill_the_disk():
    yield from bodies[:2]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    yield from bodies[2:]
try:
    run(model, output, fill_the_disk())
except (CheckpointError, MetricsError) as error:  # whichever file meets it first
    print(error)
"""


@pytest.mark.parametrize("limit", [5_000, 20_000, 150_000])
def test_a_full_disk_ends_the_run_with_a_message_and_the_checkpoint_before_stays(
    limit: int, tiny_model_directory: Path, tmp_path: Path
) -> None:
    done = run_python("-c", FULL_DISK, str(tiny_model_directory), str(tmp_path), str(limit))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cannot write" in done.stdout
    assert "File too large" in done.stdout
    (path,) = list_checkpoints(tmp_path / "checkpoints")[-1:]
    assert verify_checkpoint(path).state.step == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name[0] == "."] == []

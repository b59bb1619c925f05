"""SIGINT and SIGTERM, sent to real processes: the first ends a run with a checkpoint, the second at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.trainer.batches import make_bodies
from tests.trainer.runs import assert_equal_tensors, weights
from tests.trainer.stoppable_run import long_body, settings
from trainer import RecordedSource
from trainer.assembly import build_trainer
from trainer.checkpoint import Checkpoint
from trainer.checkpoint_store import newest_whole_checkpoint, recover_checkpoints

pytestmark = pytest.mark.slow

ENDED_WITHIN = 60.0
"""Seconds; what the signals interrupt would go on for minutes or for ever."""


class Run:
    """A run as a child process."""

    def __init__(self, model: Path, output: Path, kind: str, *others: str, launcher: tuple[str, ...] = ()):
        words = (*launcher, "-m", "tests.trainer.stoppable_run", str(model), str(output), kind, *others)
        self.log = output.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *words],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            )

    def wait_for(self, start: str) -> str:
        """The next line of its output that begins like this."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(start):
                return line
        raise AssertionError(f"it ended: {self.log.read_text()[-3000:]}")

    def ends_with(self) -> int:
        """Its exit status, negative if a signal ended it without its doing."""
        try:
            return self.process.wait(ENDED_WITHIN)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self.process.communicate()  # closes the pipe


def newest(output: Path) -> Checkpoint:
    recover_checkpoints(output / "checkpoints")
    checkpoint = newest_whole_checkpoint(output / "checkpoints")
    assert checkpoint is not None
    return checkpoint


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_ends_a_wait_for_a_batch_with_a_checkpoint(
    number: signal.Signals, code: int, tiny_model_directory: Path, tmp_path: Path
) -> None:
    run = Run(tiny_model_directory, tmp_path / "run", "wait")
    run.wait_for("now")
    run.process.send_signal(number)
    assert run.ends_with() == code
    assert f"{number.name}: stopping with a checkpoint; again to stop at once" in run.log.read_text()
    assert "Stopped after 2 optimizer steps" in run.log.read_text()
    assert newest(tmp_path / "run").state.step == 2


def test_a_run_that_still_waits_for_the_api_ends_after_its_grace(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    run = Run(tiny_model_directory, tmp_path / "run", "no api", "--checkpoint.grace", "0.5")
    run.wait_for("now")
    run.process.send_signal(signal.SIGTERM)
    assert run.ends_with() == 143
    assert "still waits for others, and there is nothing to save" in run.log.read_text()
    assert newest(tmp_path / "run").state.step == 0


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the child process: sums that are made by another number of threads have other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_step_that_outlasts_its_grace_is_given_up_and_its_batch_is_as_good_as_new(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    run = Run(tiny_model_directory, tmp_path / "run", "long step", "--checkpoint.grace", "0")
    run.wait_for("now")
    time.sleep(0.5)  # well into its micro-batches
    run.process.send_signal(signal.SIGTERM)
    assert run.ends_with() == 143
    checkpoint = newest(tmp_path / "run")
    assert (checkpoint.state.step, checkpoint.state.batches) == (2, 2)
    kept = tmp_path / "run/set_aside/batch-000003.json"
    assert kept.read_bytes() == long_body()

    resumed = settings(str(tiny_model_directory), str(tmp_path / "run"), "--train.steps", "3")
    build_trainer(resumed, source=RecordedSource([kept.read_bytes()])).run()
    whole = settings(str(tiny_model_directory), str(tmp_path / "whole"), "--train.steps", "3")
    build_trainer(whole, source=RecordedSource([*make_bodies(2), long_body()])).run()
    assert_equal_tensors(weights(tmp_path / "run/final"), weights(tmp_path / "whole/final"))


def test_a_step_within_its_grace_is_finished(tiny_model_directory: Path, tmp_path: Path) -> None:
    run = Run(tiny_model_directory, tmp_path / "run", "long step", "--checkpoint.grace", "300")
    run.wait_for("now")
    time.sleep(0.5)
    run.process.send_signal(signal.SIGINT)
    assert run.ends_with() == 130
    assert newest(tmp_path / "run").state.step == 3


def test_a_second_signal_ends_a_process_that_is_stuck_inside_a_call_into_c(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    run = Run(tiny_model_directory, tmp_path / "run", "stuck")
    run.wait_for("now")
    time.sleep(0.5)
    run.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert run.process.poll() is None, "the first signal waits for the call to end"
    run.process.send_signal(signal.SIGINT)
    assert run.ends_with() == 130
    assert "SIGINT: it came again. Stopped at once" in run.log.read_text()
    assert newest(tmp_path / "run").state.step == 0  # the one from its start


def test_two_signals_in_the_middle_of_steps_and_checkpoints_leave_whole_checkpoints(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    step = 0
    for delay in (0.0, 0.013, 0.041, 0.09):
        often = ("--checkpoint.every", "1")
        run = Run(tiny_model_directory, tmp_path / "run", "steps", *often)
        run.wait_for("now")
        time.sleep(0.5 + delay)
        run.process.send_signal(signal.SIGINT)
        run.process.send_signal(signal.SIGTERM)  # another number: equal ones would be merged
        assert run.ends_with() in (130, 143)
        assert newest(tmp_path / "run").state.step > step
        step = newest(tmp_path / "run").state.step


def test_a_signal_to_any_process_stops_all_of_them_at_the_same_step(
    tiny_model_directory: Path, tmp_path: Path, free_port: int
) -> None:
    launcher = (
        *("-m", "torch.distributed.run", "--nproc_per_node", "2"),
        *("--master_addr", "127.0.0.1", "--master_port", str(free_port)),
    )
    run = Run(tiny_model_directory, tmp_path / "run", "steps", launcher=launcher)
    pid = int(run.wait_for("rank 1").split()[-1])
    run.wait_for("now")
    os.kill(pid, signal.SIGTERM)
    run.ends_with()
    log = run.log.read_text()
    stopped = [line for line in log.splitlines() if "Stopped after" in line]
    assert len(stopped) == 2, log[-3000:]
    assert {"(SIGTERM)" in line for line in stopped} == {True, False}
    step = newest(tmp_path / "run").state.step
    assert all(f"after {step} optimizer steps" in line for line in stopped)
    assert step >= 2

"""Signals sent to real processes: the first ends a run with a checkpoint, the second at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from tests.forked import Forked, forked_ranks
from tests.trainer.batches import make_bodies
from tests.trainer.runs import assert_equal_tensors, weights
from tests.trainer.stoppable_run import long_body, settings
from trainer import RecordedSource
from trainer.checkpoints.format import Checkpoint, verify_checkpoint
from trainer.checkpoints.retention import find_newest_whole, recover_checkpoints
from trainer.cli._run import report
from trainer.config import load_config
from trainer.run.build import build_trainer
from trainer.run.loop import ASKED_ELSEWHERE, NO_MORE_BATCHES, RunSummary

pytestmark = pytest.mark.slow

ENDED_WITHIN = 120.0
"""Seconds; what the signals interrupt would go on for minutes or for ever."""


class Run:
    """A run as a child process, or, with a port to meet at, as two."""

    def __init__(
        self,
        model: Path,
        output: Path,
        kind: str,
        *others: str,
        port: int | None = None,
        before: tuple[str, ...] = (),
    ):
        module, words = "tests.trainer.stoppable_run", (str(model), str(output), kind, *others)
        self.log, self._printed = output.with_suffix(".log"), output.with_suffix(".out")
        environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        files = {"stdout": self._printed, "stderr": self.log}
        self._processes: Sequence[Forked | subprocess.Popen[bytes]]
        if before:
            command = [*before, sys.executable, "-m", module, *words]
            with self._printed.open("w") as printed, self.log.open("w") as log:
                self._processes = [subprocess.Popen(command, stdout=printed, stderr=log, env=environment)]
        elif port is None:
            self._processes = [Forked(module, words, **files, environment=environment)]
        else:
            self._processes = forked_ranks(2, port, module, words, **files)
        self.process = self._processes[0]

    def wait_for(self, start: str) -> str:
        """Wait for a line of its output that begins like this."""
        deadline = time.monotonic() + ENDED_WITHIN
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            for line in self._printed.read_text().splitlines():
                if line.startswith(start):
                    return line
            assert not ended, f"it ended: {self.log.read_text()[-3000:]}"
            time.sleep(0.01)
        raise AssertionError(f"it says nothing: {self.log.read_text()[-3000:]}")

    def wait_for_log(self, text: str) -> None:
        """Until its log says this."""
        deadline = time.monotonic() + ENDED_WITHIN
        while text not in self.log.read_text():
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.01)

    def ends_with(self) -> int:
        """Its exit status, that of process 0, negative if a signal ended it without its doing."""
        try:
            codes = [process.wait(ENDED_WITHIN) for process in self._processes]
        finally:
            for process in self._processes:
                process.kill()
        return codes[0]


def newest(output: Path) -> Checkpoint:
    recover_checkpoints(output / "checkpoints")
    checkpoint, _ = find_newest_whole(output / "checkpoints", verify_checkpoint)
    assert checkpoint is not None
    return checkpoint


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)],
)
def test_the_first_signal_ends_a_wait_for_a_batch_with_a_checkpoint(
    number: signal.Signals, code: int, tiny_model_directory: Path, tmp_path: Path
) -> None:
    run = Run(tiny_model_directory, tmp_path / "run", "wait")
    run.wait_for("now")
    run.process.send_signal(number)
    run.wait_for_log("stopping with a checkpoint")
    run.process.send_signal(signal.SIGTERM)  # within a second: an echo, as of GNU timeout
    assert run.ends_with() == code
    assert f"{number.name}: stopping with a checkpoint; again to stop at once" in run.log.read_text()
    assert "Stopped after 2 optimizer steps" in run.log.read_text()
    assert newest(tmp_path / "run").state.step == 2


def test_a_hangup_that_was_ignored_before_the_start_stays_ignored(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    run = Run(tiny_model_directory, tmp_path / "run", "wait", before=("nohup",))
    run.wait_for("now")
    run.process.send_signal(signal.SIGHUP)
    run.process.send_signal(signal.SIGTERM)
    assert run.ends_with() == 143
    assert "SIGHUP" not in run.log.read_text()


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
    time.sleep(1.2)  # a signal within a second is an echo of the first
    assert run.process.poll() is None, "the first signal waits for the call to end"
    run.process.send_signal(signal.SIGINT)
    assert run.ends_with() == 130
    assert "SIGINT: it came again. Stopped at once" in run.log.read_text()
    assert newest(tmp_path / "run").state.step == 0  # the one from its start


def test_a_signal_to_any_process_stops_all_of_them_at_the_same_micro_batch(
    tiny_model_directory: Path, tmp_path: Path, free_port: int
) -> None:
    run = Run(
        *(tiny_model_directory, tmp_path / "run", "long step", "--checkpoint.grace", "0"),
        port=free_port,
    )
    pid = int(run.wait_for("rank 1").split()[-1])
    run.wait_for("now")
    time.sleep(0.5)  # well into its micro-batches
    os.kill(pid, signal.SIGTERM)
    run.ends_with()
    log = run.log.read_text()
    assert "Training with 2 processes on 1 node, on cpu" in log
    assert "[rank 1] SIGTERM: stopping with a checkpoint" in log
    assert log.count("Stopped after 2 optimizer steps (another process was asked to stop)") == 1, log[-3000:]
    checkpoint = newest(tmp_path / "run")
    assert (checkpoint.state.step, checkpoint.state.batches) == (2, 2)
    assert (tmp_path / "run/set_aside/batch-000003.json").read_bytes() == long_body()


def test_a_failure_that_all_processes_meet_ends_them_after_process_0_has_saved(
    tiny_model_directory: Path, tmp_path: Path, free_port: int
) -> None:
    run = Run(
        *(tiny_model_directory, tmp_path / "run", "no signal", "--train.max_consecutive_skips", "1"),
        port=free_port,
    )
    assert run.ends_with() == 1
    assert run.log.read_text().count("1 batch in a row could not be trained") == 1
    checkpoint = newest(tmp_path / "run")
    assert (checkpoint.state.step, checkpoint.state.batches) == (2, 3)


@pytest.mark.parametrize(
    ("reason", "steps", "code"),
    [
        (None, 3, 0),
        (NO_MORE_BATCHES, 3, 0),
        (NO_MORE_BATCHES, 0, 1),
        ("SIGUSR1", 3, 138),
        (ASKED_ELSEWHERE, 3, 143),  # not done: a launcher on this machine must not take it for that
    ],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_process_of_a_run_that_is_not_done_says_so_by_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reason: str | None, steps: int, code: int, rank: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["--model.path", "m", "--train.output_dir", str(tmp_path)]
    config = load_config(None, words, environment={})
    summary = RunSummary(step=steps, stopped_early=reason, final_model=None, checkpoint=tmp_path, counters={})
    assert report(summary, config) == code

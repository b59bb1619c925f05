"""Starting `atropos-train local` as a user does, and looking at the processes it leaves or does not leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.compose import ROOT

_MARK = "ATROPOS_TEST_MARK"
DEADLINE = 480.0
"""Seconds for anything to happen, on a slow machine that is busy with other things."""


class Launched:
    """One `atropos-train local` in a session of its own, with everything that it starts."""

    def __init__(self, run_dir: Path, *words: str) -> None:
        self.run_dir = run_dir
        self._mark = uuid.uuid4().hex
        self._output = run_dir.with_name(f"{run_dir.name}-{self._mark}.out")
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trainer.cli", "local", "--run-dir", str(run_dir), *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Inherited by all that is started, so that it can be found however it was started.
                env={**os.environ, _MARK: self._mark, "COLUMNS": "200"},
                cwd=ROOT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._output.read_text(encoding="utf-8")

    def interrupt(self) -> None:
        """What a terminal does on Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def wait(self) -> int:
        """Wait for its end; returns the exit status."""
        return self.process.wait(timeout=DEADLINE)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for `condition` while it runs."""
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert self.process.poll() is None, f"it ended before {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"it took too long until {what}:\n{self.output}"
            time.sleep(0.1)

    def steps_done(self) -> int:
        """Rows in its metrics file."""
        path = self.run_dir / "metrics.jsonl"
        return path.read_text().count('"kind": "step"') if path.exists() else 0

    def processes(self) -> list[psutil.Process]:
        """Everything it started that still runs, itself included."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def process_of(self, module: str) -> psutil.Process:
        """The one process that runs `python -m module`."""
        (found,) = (each for each in self.processes() if ["-m", module] == each.cmdline()[1:3])
        return found

    def clean_up(self) -> None:
        """Kill whatever a failed test left."""
        for process in self.processes():
            process.kill()

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:  # it ended meanwhile, or is somebody else's
            return False

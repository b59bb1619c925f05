"""The processes of a soak: the trainer as its user starts it, an inference server, and what they hold."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx
import psutil

from tests.ports import free_port

STOP_PATIENCE = 60.0
"""Seconds; only ends a hang."""


class Program:
    """One of our commands, in a process of its own; can be killed and started again."""

    def __init__(self, words: Sequence[str], log: Path) -> None:
        self._command = [sys.executable, "-m", *words]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> Self:
        # One computing thread each: there are several of us on this machine.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=environment)
        return self

    def exit_code(self) -> int | None:
        """None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()


class Inference(Program):
    """The embedded server, which really loads what is published."""

    def __init__(self, model: Path, log: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        words = ["local_stack.inference", "--model", str(model), "--port", str(port), "--threads", "1"]
        super().__init__(words, log)

    def weight_version(self) -> str | None:
        """The label of what it serves; None while it does not answer."""
        try:
            reply = httpx.get(f"{self.url}/weight_info", timeout=STOP_PATIENCE)
        except httpx.TransportError:
            return None
        version: str | None = reply.json()["weight_version"]
        return version


@dataclass(frozen=True)
class Holding:
    """What a process holds at one moment."""

    memory: int
    """Resident memory of its own, in bytes: without what it shares, such as the files that it has mapped."""
    resident: int
    """All resident memory, in bytes. The system may drop mapped files from it and read them again."""
    files: int
    threads: int


@dataclass(frozen=True)
class Steadiness:
    """One number over the run, by quarters."""

    third: float
    """Median of the third quarter of the run."""
    fourth: float
    most_before: float
    """Largest in the first half."""
    most_after: float
    """Largest in the second."""

    @property
    def growth(self) -> float:
        """Of the median, from the third quarter to the fourth, as a share."""
        return self.fourth / self.third - 1

    @classmethod
    def of(cls, holdings: Sequence[Holding], what: Callable[[Holding], int]) -> Self:
        values = [what(each) for each in holdings]
        quarter = len(values) // 4
        return cls(
            third=statistics.median(values[2 * quarter : 3 * quarter]),
            fourth=statistics.median(values[3 * quarter :]),
            most_before=max(values[: 2 * quarter]),
            most_after=max(values[2 * quarter :]),
        )


class Sampler:
    """Looks at a process and its fetching process again and again, in a thread."""

    def __init__(self, pid: int, interval: float) -> None:
        self._process = psutil.Process(pid)
        self._interval = interval
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self.trainer: list[Holding] = []
        self.fetcher: list[Holding] = []
        self.fetchers: set[int] = set()
        """Process ids of all fetching processes seen."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._interval):
            try:
                self._look()
            except psutil.NoSuchProcess:
                continue  # one of them has just ended

    def _look(self) -> None:
        children = [
            child for child in self._process.children() if "atropos_client.fetcher" in child.cmdline()
        ]
        if not children:
            return  # not started yet, or over
        holdings = [holding_of(process) for process in (self._process, children[0])]
        self.trainer.append(holdings[0])
        self.fetcher.append(holdings[1])
        self.fetchers |= {child.pid for child in children}


def holding_of(process: psutil.Process) -> Holding:
    """Look at what a process holds.

    Raises:
        psutil.NoSuchProcess: It has ended.
    """
    memory = process.memory_info()
    return Holding(
        memory=memory.rss - memory.shared,
        resident=memory.rss,
        files=process.num_fds(),
        threads=process.num_threads(),
    )

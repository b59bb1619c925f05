"""What processes hold, sampled once a second from /proc: memory, open files, threads."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil


@dataclass(frozen=True)
class Sample:
    """One process at one moment."""

    memory: int
    """Bytes resident. Not those it alone holds: of a forked process these grow while it writes to what it
    shares with the one that it was forked from."""
    files: int
    threads: int


class Sampler:
    """Samples a process and its only child. Use as a context manager."""

    def __init__(self, pid: int, *, every: float) -> None:
        self._pid, self._every = pid, every
        self.trainer: list[Sample] = []
        self.fetcher: list[Sample] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            try:
                process = psutil.Process(self._pid)
                self.trainer.append(_sample(process))
                self.fetcher += [_sample(child) for child in process.children()]
            except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError, ProcessLookupError):
                continue  # it has ended


def _sample(process: psutil.Process) -> Sample:
    return Sample(
        memory=process.memory_info().rss,
        files=len(list(Path(f"/proc/{process.pid}/fd").iterdir())),
        threads=process.num_threads(),
    )


@dataclass(frozen=True)
class Trend:
    """The third quarter of a run against its last: of memory, files and threads the medians."""

    third: Sample
    fourth: Sample

    @property
    def growth(self) -> float:
        """Of memory, as a share."""
        return self.fourth.memory / self.third.memory - 1


def trend_of(samples: Sequence[Sample]) -> Trend:
    """Compare the two quarters of the last half."""
    half, three_quarters = len(samples) // 2, 3 * len(samples) // 4
    return Trend(_median(samples[half:three_quarters]), _median(samples[three_quarters:]))


def _median(samples: Sequence[Sample]) -> Sample:
    return Sample(
        memory=round(statistics.median(sample.memory for sample in samples)),
        files=round(statistics.median(sample.files for sample in samples)),
        threads=round(statistics.median(sample.threads for sample in samples)),
    )

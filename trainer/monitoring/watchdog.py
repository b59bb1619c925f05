"""Ends a process whose training thread is stuck, and says in what.

A thread that is stuck, in a system call or in C code, cannot be interrupted. The journal and the checkpoints
make the end safe: the next start goes on as after a SIGKILL. Nothing here waits for anybody without a bound,
not even for standard error, or the disk that the run writes to: both may be what is stuck.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import BinaryIO, Final

from atropos_client.private_files import make_run_directory, open_private
from trainer.config import TrainerConfig
from trainer.monitoring.phases import PhaseStatus, Progress, RunPhase

logger = logging.getLogger(__name__)

STUCK: Final = 75
"""Exit code of a process that was stuck: EX_TEMPFAIL of sysexits.h, "try again"."""

STACKS_FILE: Final = "stacks.txt"
"""Where the stacks are appended, in the run's output directory."""

_LARGEST_STACKS_FILE: Final = 1 << 20
"""Bytes; a larger one is begun anew, for a run that is stuck and restarted for days."""

_TICK_SECONDS: Final = 1.0
_PATIENCE_SECONDS: Final = 5.0
"""For whoever is asked, and each place that is written to, at the end."""


class Watchdog:
    """A thread that looks at the present phase once a second; a context manager.

    Every `atropos.heartbeat_every` seconds it says who is waited for; the wait for a batch does that itself.

    Args:
        progress: What it looks at.
        deadlines: Seconds that each phase may last.
        config: Of the run; section `watchdog`, and where the stacks go.
    """

    def __init__(
        self, progress: Progress, deadlines: Mapping[RunPhase, float], config: TrainerConfig
    ) -> None:
        self._progress = progress
        self._deadlines = deadlines
        self._grace = config.watchdog.grace
        self._frozen = config.watchdog.frozen_timeout
        self._remind_every = config.atropos.heartbeat_every
        self._reminded = (-1, 0)  # in which entry, and how often
        self._stacks = config.train.output_dir / STACKS_FILE
        self._tick = min(_TICK_SECONDS, min(deadlines.values()) / 4)
        self._taken = _file_in_memory()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(_PATIENCE_SECONDS)
        faulthandler.cancel_dump_traceback_later()
        if not self._thread.is_alive():
            self._taken.close()

    def _watch(self) -> None:
        armed_at = self._arm()
        while not self._stop.wait(self._tick):
            if time.monotonic() - armed_at > self._frozen / 4:
                armed_at = self._arm()
            status = self._progress.status
            if status.is_overdue(self._deadlines):
                self._arm(self._grace + 5 * _PATIENCE_SECONDS)
                try:
                    self._cry(status)
                except Exception as error:  # noqa: BLE001 - the end must come, with stacks or without
                    within(
                        _PATIENCE_SECONDS, partial(logger.error, "The stacks could not be taken: %r", error)
                    )
                self._end_unless_it_goes_on(status)
                armed_at = self._arm()
            else:
                self._remind(status)

    def _arm(self, more: float = 0.0) -> float:
        """Put off the end that needs no Python, by `more` seconds than usual."""
        with contextlib.suppress(OSError, ValueError):  # there is no standard error to write to
            faulthandler.dump_traceback_later(self._frozen + more, exit=True, file=2)
        return time.monotonic()

    def _remind(self, status: PhaseStatus) -> None:
        if status.phase is RunPhase.WAITING:
            return
        serial, before = self._reminded
        times = int(status.seconds() / self._remind_every)
        if times > (before if serial == status.serial else 0):
            self._reminded = (status.serial, times)
            line = f"still {status.phase} after {status.seconds():.0f} s, waiting for {status.party}"
            within(_PATIENCE_SECONDS, lambda: logger.info("%s", line))

    def _cry(self, status: PhaseStatus) -> None:
        """Say what is stuck, with the stacks of all threads."""
        stacks = take_stacks(self._taken)
        party = within(_PATIENCE_SECONDS, status.describe) or f"{status.party} (which could not be asked)"
        message = (
            f"stuck in phase {status.phase} for {status.seconds():.0f} s, longer than "
            f"watchdog.{status.phase}_timeout ({self._deadlines[status.phase]:g} s), waiting for {party}"
        )
        within(_PATIENCE_SECONDS, lambda: logger.critical("The run is %s. All threads:", message))
        within(_PATIENCE_SECONDS, lambda: _write_all(2, stacks.encode()))
        head = f"==== {datetime.now(tz=UTC).isoformat()} process {os.getpid()}: {message}\n"
        if not within(_PATIENCE_SECONDS, lambda: self._append(head + stacks)):
            within(
                _PATIENCE_SECONDS, lambda: logger.error("The stacks could not be written to %s", self._stacks)
            )

    def _append(self, text: str) -> bool:
        try:
            make_run_directory(self._stacks.parent)
            too_large = self._stacks.exists() and self._stacks.stat().st_size > _LARGEST_STACKS_FILE
            with open_private(self._stacks, "w" if too_large else "a") as file:
                file.write(text)
        except OSError:
            return False
        return True

    def _end_unless_it_goes_on(self, status: PhaseStatus) -> None:
        ends_at = time.monotonic() + self._grace
        while time.monotonic() < ends_at:
            if self._stop.wait(min(self._tick, 0.1)):
                return
            if self._progress.status.serial != status.serial:
                logger.warning("RunPhase %s has ended after all; the run goes on", status.phase)
                return
        last_words = f"ending with exit code {STUCK}; start again to go on from the newest checkpoint"
        within(_PATIENCE_SECONDS, lambda: logger.critical("%s", last_words))
        within(_PATIENCE_SECONDS, logging.shutdown)
        os._exit(STUCK)


def take_stacks(file: BinaryIO) -> str:
    """The stacks of all threads as text.

    By way of a file of its own: `faulthandler` keeps every thread from running while it writes, and a pipe
    that nobody reads would keep it for ever.

    Args:
        file: What they are written to, instead of what it held; opened ahead, as a run that can open no more
            files is among those that get stuck.
    """
    file.seek(0)
    file.truncate()
    faulthandler.dump_traceback(file, all_threads=True)
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def _file_in_memory() -> BinaryIO:
    """A file that no disk can hold up; on a disk where the system has no such files."""
    create = getattr(os, "memfd_create", None)
    if create is not None:
        return os.fdopen(create("stacks"), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def within(seconds: float, action: Callable[[], object]) -> object:
    """Run an action in a thread of its own; None if it does not end in time, or fails."""
    results: list[object] = []

    def run() -> None:
        with contextlib.suppress(Exception):
            results.append(action())

    thread = threading.Thread(target=run, name="watchdog's errand", daemon=True)
    with contextlib.suppress(RuntimeError):  # no thread can be started while the interpreter ends
        thread.start()
        thread.join(seconds)
    return results[0] if results else None


def _write_all(descriptor: int, text: bytes) -> None:
    view = memoryview(text)
    while view:
        view = view[os.write(descriptor, view) :]

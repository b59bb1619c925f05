"""A clock for deadlines: seconds in which this process could run.

A process that is stopped (Ctrl-Z, SIGSTOP, a frozen container, a machine that sleeps) does not wait for
anybody. On `time.monotonic` its deadlines have passed when it goes on, before it has looked again at whom it
waits for; on this clock they have not.
"""

from __future__ import annotations

import threading
import time
from typing import Final

STOOD_STILL: Final = 3.0
"""Seconds between two looks at the clock that are more than a busy machine keeps a thread from running."""

_TICK: Final = 1.0


class _Clock:
    """Looked at by a thread of its own once a second, so that a longer pause is one of the whole process."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None
        self._looked_at = time.monotonic()
        self._stood_still = 0.0

    def now(self) -> float:
        if self._thread is None or not self._thread.is_alive():  # the first look, or after a fork
            self._start()
        return self._look()

    def _look(self) -> float:
        with self._guard:
            now = time.monotonic()
            pause = now - self._looked_at
            if pause > STOOD_STILL:
                self._stood_still += pause - _TICK
            self._looked_at = now
            return now - self._stood_still

    def _start(self) -> None:
        with self._guard:
            if self._thread is not None and self._thread.is_alive():
                return
            self._looked_at = time.monotonic()
            self._thread = threading.Thread(target=self._tick, name="clock", daemon=True)
            self._thread.start()

    def _tick(self) -> None:
        while True:
            time.sleep(_TICK)
            self._look()


_clock = _Clock()


def running_time() -> float:
    """Seconds since some moment, without those in which the whole process stood still."""
    return _clock.now()

"""Signals: the first asks the run to end with a checkpoint, the second ends the process at once.

A thread of its own hears of signals through a pipe that the system's signal handler writes to. So it does not
matter what the main thread does: compute, write, or wait inside C code for something that never comes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Final, Self

logger = logging.getLogger(__name__)

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Schedulers send SIGUSR1 before they take the machine away; SIGHUP comes when a terminal is closed."""

_IGNORED_IF_INHERITED: Final = (signal.SIGHUP, signal.SIGUSR1)
"""Whoever started us may have had them ignored: nohup does. A shell's `&` does so to SIGINT, and means only
the terminal's."""

_ECHO_SECONDS: Final = 1.0
"""A signal so soon after the first is the same one once more: `timeout` and supervisors send it to a process
and to its group, a terminal to a launcher's processes, to which the launcher passes it on."""

_LAST_WORDS_SECONDS: Final = 0.5
"""For the last log line; whoever reads the log, or holds its lock, may be stuck as well."""


class StopSignals:
    """While it is entered, in the main thread, signals stop the run; see the module.

    Args:
        request_stop: Called with the first signal's name, in another thread.
        nothing_to_save: Asked once, `grace` seconds after it: whether the run, if it has not ended, may be
            ended from here.
        grace: Seconds.
    """

    def __init__(
        self,
        request_stop: Callable[[str], None],
        *,
        nothing_to_save: Callable[[], bool],
        grace: float,
    ) -> None:
        self._request_stop = request_stop
        self._nothing_to_save = nothing_to_save
        self._grace = grace
        self._handlers: dict[signal.Signals, Any] = {}
        self._wakeup_before = -1

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        # Without a handler of Python's, nothing is written to the pipe.
        self._handlers = {
            each: signal.signal(each, _leave_it_to_the_thread)
            for each in STOP_SIGNALS
            if each not in _IGNORED_IF_INHERITED or signal.getsignal(each) != signal.SIG_IGN
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each, handler in self._handlers.items():
            signal.signal(each, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._writer.close()  # the thread reads the end
        self._thread.join()
        self._reader.close()

    def _watch(self) -> None:
        first, asked_at = 0, 0.0
        while True:
            try:
                received = self._reader.recv(1)
            except TimeoutError:
                self._reader.settimeout(None)
                if self._nothing_to_save():
                    _end_at_once(first, "it still waits for others, and there is nothing to save")
                continue
            if not received:
                return
            number = received[0]
            if number not in STOP_SIGNALS:
                continue
            if not first:
                first, asked_at = number, time.monotonic()
                name = signal.Signals(number).name
                logger.warning("%s: stopping with a checkpoint; again to stop at once, without one", name)
                self._request_stop(name)
                self._reader.settimeout(max(self._grace, 0.1))
            elif time.monotonic() - asked_at >= _ECHO_SECONDS:
                _end_at_once(number, "it came again")


def exit_code(signal_name: str) -> int:
    """Exit code that a shell reports for a program that the signal ended: SIGINT 130, SIGTERM 143."""
    return 128 + signal.Signals[signal_name].value


def is_stop_signal(name: str) -> bool:
    """Whether this is the name of a signal that ends a run."""
    return name in {each.name for each in STOP_SIGNALS}


def _end_at_once(number: int, reason: str) -> None:
    name = signal.Signals(number).name
    last_words = threading.Thread(
        target=logger.warning,
        args=("%s: %s. Stopped at once; what is on the disk is whole", name, reason),
        daemon=True,
    )
    with contextlib.suppress(RuntimeError):  # no thread can be started while the interpreter ends
        last_words.start()
        last_words.join(_LAST_WORDS_SECONDS)
    os._exit(exit_code(name))


def _leave_it_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Nothing: system calls of the main thread go on where they were interrupted."""

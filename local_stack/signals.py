"""Requests to stop, as flags: a signal may arrive anywhere, a flag is read where it is safe.

Were Ctrl-C an exception, it could strike after a process was started and before it was written down, and
that process would be left behind.
"""

from __future__ import annotations

import signal
from typing import Any, Self

from local_stack.errors import StoppedByUserError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequests:
    """Counts Ctrl-C, SIGTERM and a closed terminal while it is entered; the main thread only."""

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # started by nohup: a closed terminal is no request
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def raise_if_requested(self) -> None:
        """Raise `StoppedByUserError` if there was a request."""
        if self.count:
            raise StoppedByUserError("stopped as requested")

    @property
    def hurry(self) -> bool:
        """Whether there was more than one request: do not wait for anything any more."""
        return self.count > 1

    def _note(self, *_: object) -> None:
        self.count += 1

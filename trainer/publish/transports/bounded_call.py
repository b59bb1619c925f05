"""Bounds calls that may never return: a collective whose other side has died waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Self, TypeVar

Value = TypeVar("Value")


class BoundedCall(Future[Value]):
    """Runs an action in a daemon thread, once started, which is left behind if it does not end in time.

    The action has to be one that does no harm when it goes on after nobody waits for it any more. Whoever is
    to call `fail` is told so before the start: the action may fail before its starter's next line.

    Args:
        action: What to do.
        name: The thread's name.
    """

    def __init__(self, action: Callable[[], Value], *, name: str) -> None:
        super().__init__()
        self._action = action
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> Self:
        """Begin; once only."""
        self._thread.start()
        return self

    def fail(self, error: BaseException) -> None:
        """End the wait with an error, for instance because the other side has said no. Thread-safe."""
        with suppress(InvalidStateError):  # it has ended, one way or the other
            self.set_exception(error)

    def within(self, seconds: float) -> Value:
        """Wait for what the action returns.

        Raises:
            NotEndedError: It has not ended in time.
            BaseException: What the action raised, or what `fail` was given.
        """
        try:
            return self.result(seconds)
        except TimeoutError:
            if self.done():  # the action's own
                raise
            raise NotEndedError(f"it did not end within {seconds:g} s") from None

    def _run(self) -> None:
        try:
            value = self._action()
        except BaseException as error:  # noqa: BLE001 - it belongs to the thread that waits
            self.fail(error)
        else:
            with suppress(InvalidStateError):  # given up meanwhile
                self.set_result(value)


class NotEndedError(Exception):
    """A call did not end in time."""

"""The bounded hand-over between the polling thread and the threads that train.

Knows nothing of HTTP: it holds a few batches, says when one more may be fetched, wakes whoever waits, and
passes on what the producer died of, so that nobody waits for a thread that is gone.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class NothingInTime(Exception):  # noqa: N818 - internal signal, translated by the poller
    """`take` waited as long as it was told."""


class Closed(Exception):  # noqa: N818 - internal signal, translated by the poller
    """`take` on a shelf that is empty and whose producer has ended without a failure."""


class Shelf(Generic[T]):
    """Holds at most `depth` items, or one more while somebody waits and `depth` is 0."""

    def __init__(self, depth: int) -> None:
        """Make an empty shelf; a depth of 0 means: only while somebody waits."""
        self._depth = depth
        self._changed = threading.Condition()
        self._items: deque[T] = deque()
        self._takers = 0
        self._stopping = False
        self._ended = False
        self._failure: BaseException | None = None

    # The producer's side.

    def wait_for_room(self) -> bool:
        """Wait until one more item may be produced. False: stop producing."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._has_room())
            return not self._stopping

    def has_room(self) -> bool:
        """Whether one more item may be produced right now."""
        with self._changed:
            return self._has_room()

    def _has_room(self) -> bool:
        return len(self._items) < max(self._depth, 1 if self._takers else 0)

    def pause(self, seconds: float) -> bool:
        """Wait, but no longer than until `stop`. False: stop producing."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping, seconds)
            return not self._stopping

    def put(self, item: T) -> None:
        """Add an item and wake a taker."""
        with self._changed:
            self._items.append(item)
            self._changed.notify_all()

    def end(self, failure: BaseException | None) -> None:
        """Say that nothing more will come, and why."""
        with self._changed:
            self._failure = failure
            self._ended = True
            self._changed.notify_all()

    # The takers' side.

    def take(self, timeout: float | None) -> T:
        """Take the oldest item.

        Raises:
            NothingInTime: If none came within `timeout` seconds.
            Closed: If none will come any more.
            BaseException: What the producer died of, once the shelf is empty.
        """
        with self._changed:
            self._takers += 1
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._items or self._ended, timeout)
                if self._items:
                    return self._items.popleft()
            finally:
                self._takers -= 1
                self._changed.notify_all()
            if self._failure is not None:
                raise self._failure
            raise Closed if self._ended else NothingInTime

    def stop(self) -> None:
        """Ask the producer to stop."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def drain(self) -> list[T]:
        """Take everything that is left, without waiting."""
        with self._changed:
            left = list(self._items)
            self._items.clear()
            return left

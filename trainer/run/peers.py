"""Messages between the processes of a run: that they live, and what ended them.

They say it in the store in which they found each other, from a thread of its own, so that it does not depend
on what the training threads do. When a connection breaks, it is from here that the message knows whose.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

from torch import distributed

from atropos_client.clock import running_time
from trainer.errors import AnotherProcessFailed

logger = logging.getLogger(__name__)

_BEAT_SECONDS: Final = 1.0
_SILENT_SECONDS: Final = 4.0
"""A process from which nothing was heard for so long is gone: its thread needs the interpreter only."""

_STORE_TIMEOUT: Final = timedelta(seconds=10)

_FIRST_END: Final = "first end"
"""In the store: the rank that was the first to say what ends it."""

_NO_WORD: Final = (
    "has ended without a word: it was killed, or its machine has no memory left; the launcher's list of exit "
    "codes says more"
)


class Peers:
    """The other processes of the run; with one process there are none.

    Args:
        rank: Of this process.
        count: How many train together.
    """

    def __init__(self, rank: int, count: int) -> None:
        self._rank = rank
        self._others = [other for other in range(count) if other != rank]
        self._closed = threading.Event()
        self._process_0_has_said = self._has_said = False
        self.parted = False
        """Whether this process has left a collective in which others may still wait."""
        self.on_end: Callable[[AnotherProcessFailed, float], None] = lambda end, seconds: None
        """Called about once a second, in a thread of its own, when another process has said that it ends:
        with that, and the seconds since it was heard."""
        self._heard: dict[int, tuple[bytes, float]] = {}  # the newest sign of life, and when it was new
        if not self._others:
            return
        store: Any = distributed.distributed_c10d._get_default_store()  # nothing public gives it
        self._store = store.clone()  # a connection of its own: a wait of the training thread holds it up
        self._store.set(f"place/{rank}", f"on {socket.gethostname()} (process {os.getpid()})")
        self._store.set(f"alive/{rank}", "0")
        places = self._store.multi_get([f"place/{other}" for other in self._others])
        self._places = dict(zip(self._others, (place.decode() for place in places), strict=True))
        self._store.set_timeout(_STORE_TIMEOUT)
        self._listen()
        self._thread = threading.Thread(target=self._beat, name="peers", daemon=True)
        self._thread.start()

    def silent(self) -> dict[int, float]:
        """Return the ranks that seem to be gone, with the seconds since they were heard; on process 0."""
        now = running_time()
        ages = {other: now - since for other, (_, since) in self._heard.items()}
        return {other: age for other, age in ages.items() if age > _SILENT_SECONDS}

    def say_end(self, cause: str) -> None:
        """Let the others know what ends this process; once."""
        if self._others and not self._has_said:
            self._has_said = True
            with contextlib.suppress(RuntimeError):
                self._store.set(f"end/{self._rank}", cause)
                self._store.compare_set(_FIRST_END, "", str(self._rank))
            if self._rank == 0:  # the store may be in this process: they hear of it while it lives
                time.sleep(2 * _BEAT_SECONDS)

    def explain(self, error: AnotherProcessFailed) -> AnotherProcessFailed:
        """Say which process has failed, where, and of what, and see that one process says so.

        Waits for some seconds to see who is silent.
        """
        if error.told or not self._others:
            return error
        try:
            gone, what = self._find_gone()
        except RuntimeError:  # the store is gone too: it is with process 0, or its launcher
            gone, what = 0, _NO_WORD
        if gone is None:
            return error
        return self._end_of(gone, what)

    def _end_of(self, gone: int, what: str) -> AnotherProcessFailed:
        speaker = min({self._rank, *self._others} - {gone})
        told = self._process_0_has_said or self._rank != speaker
        return AnotherProcessFailed(f"rank {gone} {self._places[gone]} {what}", told=told)

    def close(self) -> None:
        """Be heard no more. May be called twice."""
        self._closed.set()
        if self._others:
            self._thread.join(_STORE_TIMEOUT.total_seconds())

    def _find_gone(self) -> tuple[int | None, str]:
        self._listen()
        ends_at = running_time() + _SILENT_SECONDS + 2 * _BEAT_SECONDS
        while running_time() < ends_at:
            for other in self._others:
                if self._store.check([f"end/{other}"]):
                    return other, self._said_by(other)
            if silent := self.silent():  # the first one: others may have left because of it
                return max(silent, key=lambda other: silent[other]), _NO_WORD
            time.sleep(_BEAT_SECONDS / 4)
            self._listen()
        return None, ""

    def _said_by(self, other: int) -> str:
        self._process_0_has_said |= other == 0
        return f"failed: {self._store.get(f'end/{other}').decode()}"

    def _listen(self) -> None:
        signs = self._store.multi_get([f"alive/{other}" for other in self._others])
        for other, sign in zip(self._others, signs, strict=True):
            if other not in self._heard or self._heard[other][0] != sign:
                self._heard[other] = sign, running_time()

    def _beat(self) -> None:
        count, ends_heard = 0, 0
        while not self._closed.wait(_BEAT_SECONDS):
            count += 1
            try:
                self._store.set(f"alive/{self._rank}", str(count))
                if self._rank == 0:
                    self._listen()
                if not self._has_said and self._store.check([_FIRST_END]):
                    first = int(self._store.get(_FIRST_END))
                    self.on_end(self._end_of(first, self._said_by(first)), ends_heard * _BEAT_SECONDS)
                    ends_heard += 1
            except RuntimeError:  # the store has left; what comes of that, the training thread notices
                return

"""Ends of a trainer by SIGKILL at a moment that is chosen beforehand, from inside its own process.

The interpreter reports what touches the file system (`sys.addaudithook`), and SQLite runs its statements
through a connection class of ours: the process kills itself at the n-th of them. The trainer knows nothing of
it.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import sqlite3
import sys
import threading
from dataclasses import dataclass
from typing import Any, Final

PLACES: Final = {"checkpoint": "/checkpoints/", "publish": "/published/"}
"""Where the files of what is being written lie."""

OPERATIONS: Final = {"checkpoint": 240, "publish": 240, "journal": 36}
"""At most so many operations into a life: about ten steps with three checkpoints."""

KINDS: Final = ("time", "checkpoint", "publish", "journal")


@dataclass(frozen=True)
class Death:
    """When to die."""

    kind: str
    """time: nowhere in particular, from outside. Else: at an operation of this kind."""
    operation: int = 0
    """The number of the operation, from 1."""
    delay: float = 0.0
    """Seconds to wait after it (kind time: after the start), with everything going on."""

    @classmethod
    def draw(cls, kind: str, generator: random.Random, *, longest_life: float) -> Death:
        """Choose a moment; half of them a little after an operation, inside of what follows it."""
        if kind == "time":
            return cls(kind, delay=generator.uniform(0.0, longest_life))
        delay = generator.choice([0.0, generator.uniform(0.0, 0.03)])
        return cls(kind, operation=generator.randint(1, OPERATIONS[kind]), delay=delay)

    def arm(self) -> None:
        """Let this process die of it."""
        if self.kind == "journal":
            factory = functools.partial(_DyingConnection, fuse=_Fuse(self))
            sqlite3.connect = functools.partial(sqlite3.connect, factory=factory)  # type: ignore[assignment]
        elif self.kind in PLACES:
            fuse, place = _Fuse(self), PLACES[self.kind]

            def watch(event: str, arguments: tuple[Any, ...]) -> None:
                if arguments and isinstance(arguments[0], str | os.PathLike) and place in str(arguments[0]):
                    fuse.burn()

            sys.addaudithook(watch)


class _Fuse:
    def __init__(self, death: Death) -> None:
        self._left = death.operation
        self._delay = death.delay

    def burn(self) -> None:
        self._left -= 1
        if self._left == 0:
            if self._delay:
                threading.Timer(self._delay, _die).start()
            else:
                _die()


class _DyingConnection(sqlite3.Connection):
    """Dies after a statement that writes: most of them lie inside a transaction, some end one."""

    def __init__(self, *arguments: Any, fuse: _Fuse, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._fuse = fuse

    def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:  # type: ignore[override]
        cursor = super().execute(statement, *arguments)
        if not statement.startswith(("SELECT", "PRAGMA")):
            self._fuse.burn()
        return cursor


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)

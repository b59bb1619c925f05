"""Keeps notes of a journal's processes without waiting for the disk: they outlive them, not the machine.

A SIGKILL leaves a file as it was last written, flushed or not. So after one this file, `journal.marks`, tells
how many transactions the database has to know of, which batch was being read when the process died, and
whether the API had been asked for one. After a power cut it may know less than the database, never more.

It is also how the trainer and its fetching process tell each other numbers while both live: what is wanted,
and what was counted. Each field has one writer.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from atropos_client.errors import JournalNotWritten

FILE_NAME: Final = "journal.marks"
UNCLEAN_ENDS: Final = 2
"""After so many ends while it was being read, a batch is not read again."""

COUNTED: Final = (
    "polls",
    "batches",
    "empty_replies",
    "bytes",
    "possibly_lost",
    "unreadable",
    "failed_requests",
    "registrations",
    "re_registrations",
)
"""Counters of the fetching process; see `FetchCounters`."""

_FIELDS: Final = (
    "writes",  # transactions that were committed, at least
    "in_hand",  # batch that is being read
    "suspect",  # batch that was in hand when a process ended
    "ends",  # how often in a row
    "polling_since",  # monotonic nanoseconds at which the API was asked for a batch; 0: nothing is under way
    "up_to",  # wanted by the trainer: number of the last batch to fetch
    "version",  # policy version that is served; -1: unknown
    "step",  # optimizer steps done, for registrations
    "alive_at",  # monotonic nanoseconds of the fetching process's last sign of life
    *COUNTED,
)
_DIGITS: Final = 20
_TROUBLE_AT: Final = 1024  # bytes from the beginning: behind every number
_TROUBLE_BYTES: Final = 1024


class Marks:
    """Numbers in a small file, and one text. Processes and threads may share it."""

    def __init__(self, directory: Path, *, writable: bool) -> None:
        """Open the file; a reader does without it if there is none.

        Raises:
            JournalNotWritten: It cannot be opened.
        """
        path = directory / FILE_NAME
        flags = (os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY) | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor: int | None = None
        if writable or path.is_file():
            try:
                self._descriptor = os.open(path, flags, 0o600)
            except OSError as error:
                raise JournalNotWritten(f"{path} cannot be opened: {error.strerror}") from error

    def close(self) -> None:
        """Close the file: every number is 0 from then on. May be called twice."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def get(self, field: str) -> int:
        """Return a number; 0: it was never written."""
        text = self._read(_FIELDS.index(field) * (_DIGITS + 1), _DIGITS)
        return int(text) if len(text) == _DIGITS and text.lstrip(b"-").isdigit() else 0

    def set(self, field: str, value: int) -> None:
        """Write a number."""
        self._write(_FIELDS.index(field) * (_DIGITS + 1), b"%0*d\n" % (_DIGITS, value))

    def add(self, field: str, more: int = 1) -> int:
        """Count; returns how many there are now. Only for the field's one writer."""
        total = self.get(field) + more
        self.set(field, total)
        return total

    @property
    def trouble(self) -> str | None:
        """Failure of the last request to the API. None: it did not fail."""
        text = self._read(_TROUBLE_AT, _TROUBLE_BYTES).split(b"\n")[0].rstrip()
        return text.decode(errors="replace") or None

    @trouble.setter
    def trouble(self, text: str | None) -> None:
        line = " ".join((text or "").split()).encode()[: _TROUBLE_BYTES - 1]
        self._write(_TROUBLE_AT, line.ljust(_TROUBLE_BYTES - 1) + b"\n")

    def begin_fetching(self, *, possibly_lost: int) -> None:
        """Count from zero again, but for what was lost before."""
        for name in COUNTED:
            self.set(name, 0)
        self.set("possibly_lost", possibly_lost)
        self.trouble = None

    def hold(self, number: int) -> None:
        """Note that a batch is being read."""
        self.set("in_hand", number)

    def release(self) -> None:
        """Note that the batch in hand did no harm."""
        if self.get("suspect") == self.get("in_hand"):
            self.set("suspect", 0)
        self.set("in_hand", 0)

    def blame(self) -> int | None:
        """Count the end of the process before; returns the batch that it is to blame on, if it is one."""
        held = self.get("in_hand")
        if not held:
            return None
        ends = self.get("ends") + 1 if held == self.get("suspect") else 1
        self.set("ends", ends)
        self.set("suspect", held)
        self.set("in_hand", 0)
        return held if ends >= UNCLEAN_ENDS else None

    def _read(self, offset: int, size: int) -> bytes:
        return b"" if self._descriptor is None else os.pread(self._descriptor, size, offset)

    def _write(self, offset: int, data: bytes) -> None:
        if self._descriptor is not None:
            os.pwrite(self._descriptor, data, offset)

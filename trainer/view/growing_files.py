"""Reads on in files of lines that grow, and that are renamed meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

TakeLine = Callable[[int, int, bytes], None]
"""Gets the inode of a line's file, where it begins there, and the line with its end."""


class GrowingFiles:
    """Knows how far each file was read, whatever its name is now.

    Args:
        first_bytes: Of a file at its end, at the first look. None: all of it.
    """

    def __init__(self, *, first_bytes: int | None = None) -> None:
        self._first_bytes = first_bytes
        self._read: dict[int, int] = {}  # bytes, by inode

    def read_on(self, path: Path, take: TakeLine) -> int | None:
        """Hand on the whole lines that are new; returns the file's inode, None where there is no file."""
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                skipped = 0 if self._first_bytes is None else max(0, status.st_size - self._first_bytes)
                start = self._read.get(status.st_ino, skipped)
                file.seek(start)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # being written
                    take(status.st_ino, start, line)
                    start += len(line)
                self._read[status.st_ino] = start
        except FileNotFoundError:  # renamed or pruned meanwhile
            return None
        return status.st_ino

"""Finds the trainer's log-probs that a run recorded (`trainer.run.logprob_log`), by batch."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Final

from trainer.row_files import LOGPROBS_FILE

_BATCH: Final = re.compile(rb'\{"batch": (\d+),')


class RecordedLogprobs:
    """Knows where in the files each batch is; read on as they grow.

    Args:
        directory: The run's output directory.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / LOGPROBS_FILE
        self._paths = (path.with_suffix(".older.jsonl"), path)
        self._read: dict[int, int] = {}  # bytes of each file, by its inode: files are renamed
        self._lines: dict[int, list[tuple[int, int]]] = {}  # inode and offset, by batch

    def of_group(self, batch: int, place: int) -> dict[int, list[float]]:
        """The log-probs of the trained tokens of a group, by sequence; empty if none were recorded."""
        files = self._read_new()
        found: dict[int, list[float]] = {}
        for inode, offset in self._lines.get(batch, ()):
            if inode not in files:
                continue
            with files[inode].open("rb") as file:
                file.seek(offset)
                try:
                    row = json.loads(file.readline())
                    if row["group"] == place:
                        found[int(row["sequence"])] = [float(value) for value in row["logprobs"]]
                except (ValueError, LookupError, TypeError):
                    continue  # changed by hand
        return found

    def _read_new(self) -> dict[int, Path]:
        """Read on; returns the files by inode."""
        files: dict[int, Path] = {}
        for path in self._paths:
            try:
                with path.open("rb") as file:
                    inode = os.fstat(file.fileno()).st_ino
                    files[inode] = path
                    file.seek(self._read.get(inode, 0))
                    for line in file:
                        if not line.endswith(b"\n"):
                            break
                        start = self._read.get(inode, 0)
                        self._read[inode] = start + len(line)
                        if match := _BATCH.match(line):
                            self._lines.setdefault(int(match[1]), []).append((inode, start))
            except FileNotFoundError:
                continue
        return files

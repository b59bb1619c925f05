"""Finds the trainer's log-probs that a run recorded (`trainer.run.logprob_log`), by batch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

from trainer.row_files import LOGPROBS_FILE
from trainer.view.growing_files import GrowingFiles

_BATCH: Final = re.compile(rb'\{"batch": (\d+),')


class RecordedLogprobs:
    """Knows where in the files each batch is; read on as they grow.

    Args:
        directory: The run's output directory.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / LOGPROBS_FILE
        self._paths = (path.with_suffix(".older.jsonl"), path)
        self._files = GrowingFiles()
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
        found = ((self._files.read_on(path, self._take), path) for path in self._paths)
        return {inode: path for inode, path in found if inode is not None}

    def _take(self, inode: int, offset: int, line: bytes) -> None:
        if match := _BATCH.match(line):
            self._lines.setdefault(int(match[1]), []).append((inode, offset))

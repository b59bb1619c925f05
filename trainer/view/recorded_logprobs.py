"""Finds the trainer's log-probs that a run recorded (`trainer.run.logprob_log`), by batch."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Final

from trainer.row_files import LOGPROBS_FILE
from trainer.view.growing_files import GrowingFiles

_PLACE: Final = re.compile(rb'\{"batch": (\d+), "step": \d+, "group": (\d+),')


class RecordedLogprobs:
    """Knows where in the files each group is; read on as they grow.

    Args:
        directory: The run's output directory.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / LOGPROBS_FILE
        self._paths = (path.with_suffix(".older.jsonl"), path)
        self._files = GrowingFiles()
        self._lines: dict[int, dict[int, list[tuple[int, int]]]] = {}  # inode and offset, by batch and group

    def groups(self, batch: int) -> Collection[int]:
        """Places of the groups of a batch of which log-probs were recorded."""
        files = self._read_new()
        lines = self._lines.get(batch, {})
        return [place for place, found in lines.items() if any(inode in files for inode, _ in found)]

    def of_group(self, batch: int, place: int) -> dict[int, list[float]]:
        """The log-probs of the trained tokens of a group, by sequence; empty if none were recorded."""
        files = self._read_new()
        found: dict[int, list[float]] = {}
        for inode, offset in self._lines.get(batch, {}).get(place, ()):
            if inode not in files:
                continue
            with files[inode].open("rb") as file:
                file.seek(offset)
                try:
                    row = json.loads(file.readline())
                    found[int(row["sequence"])] = [float(value) for value in row["logprobs"]]
                except (ValueError, LookupError, TypeError):
                    continue  # changed by hand
        return found

    def _read_new(self) -> dict[int, Path]:
        """Read on; returns the files by inode."""
        found = ((self._files.read_on(path, self._take), path) for path in self._paths)
        return {inode: path for inode, path in found if inode is not None}

    def _take(self, inode: int, offset: int, line: bytes) -> None:
        if match := _PLACE.match(line):
            of_batch = self._lines.setdefault(int(match[1]), {})
            of_batch.setdefault(int(match[2]), []).append((inode, offset))

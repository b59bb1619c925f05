"""Reads which groups a run has set aside and why, but not the groups (`set_aside/groups*.jsonl`)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Final

from trainer.samples.quarantine_rate import kind_of_reason
from trainer.view.growing_files import GrowingFiles

READ_BYTES: Final = 256 << 20
"""Of a file at its end, at the first look; what lies before is left out."""
_GROUP: Final = b', "group": '
_LONGEST_HEAD: Final = 1 << 16
_KEPT_BATCHES: Final = 10_000


class SetAsideReasons:
    """Reasons by batch and by kind, read on as the files grow.

    Args:
        directory: The run's `set_aside`; need not be there.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = GrowingFiles(first_bytes=READ_BYTES)
        self._by_batch: dict[int, dict[int, str]] = {}
        self.kinds: Counter[str] = Counter()
        """Groups by reason; reasons that differ in numbers only are one."""

    def of_batch(self, number: int) -> dict[int, str]:
        """Reasons of the groups of a batch, by place."""
        return self._by_batch.get(number, {})

    def read_new(self) -> None:
        """Read what was appended since the last call."""
        for path in sorted(self._directory.glob("groups*.jsonl")):
            self._files.read_on(path, self._take)

    def _take(self, _inode: int, _offset: int, line: bytes) -> None:
        end = line.find(_GROUP, 0, _LONGEST_HEAD)
        try:
            head = json.loads(line[:end] + b"}")
            batch, place, reason = int(head["batch"]), int(head["group_index"]), str(head["reason"])
        except (ValueError, LookupError, TypeError):
            return  # the middle of a line, or changed by hand
        known = self._by_batch.setdefault(batch, {})
        if place not in known:
            self.kinds[kind_of_reason(reason).kind] += 1
        known[place] = reason
        if len(self._by_batch) > _KEPT_BATCHES:
            del self._by_batch[min(self._by_batch)]

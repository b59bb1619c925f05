"""Keeps what is not trained on, with the reason: `<output_dir>/set_aside/`.

::

    set_aside/
    ├── groups.jsonl           single groups of good batches, one a line, newest last
    ├── groups-000420.jsonl    older ones, up to batch 420
    └── batch-000431.json      a whole batch, as it came

The directory is bounded: what is oldest by its batch goes first.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path

from atropos_client.private_files import make_private_directory, open_private, write_private
from schemas import count_of
from trainer.row_files import drop_rows
from trainer.samples.validation import QuarantinedGroup

logger = logging.getLogger(__name__)

_REASONS_LOGGED = 5  # groups of one batch that get a line of their own in the log
_PARTS = 8  # the groups are cut into so many files of the bound at most: the unit in which they are deleted
_NUMBERED = re.compile(r"(?:groups|batch)-(\d{6,})\.jsonl?")


class QuarantineStore:
    """Keeps groups and whole batches that were not trained on, for inspection.

    Args:
        directory: Created when the first thing is set aside; private.
        max_bytes: What it may take on the disk.
    """

    def __init__(self, directory: Path, *, max_bytes: int = 4 << 30) -> None:
        self._directory = directory
        self._groups = directory / "groups.jsonl"
        self._max_bytes = max_bytes
        self.pruned = 0
        """Files of this directory that were deleted, or not written, because of the bound."""

    def forget_after(self, batch: int) -> None:
        """Drop the groups of later batches: a resumed run gets these batches again."""
        for path in (*self._directory.glob("groups-*.jsonl"), self._groups):
            drop_rows(path, lambda row: bool(row["batch"] > batch))

    def keep_groups(self, groups: list[QuarantinedGroup], *, batch: int) -> None:
        """Append groups to groups.jsonl and log the first reasons: a batch may hold thousands of them."""
        for group in groups[:_REASONS_LOGGED]:
            logger.warning(
                "Set aside group %d of batch %d from environment %s: %s",
                group.group_index,
                batch,
                group.env_id,
                group.reason,
            )
        if len(groups) > _REASONS_LOGGED:
            logger.warning(
                "Set aside %s more of batch %d: see %s",
                count_of(len(groups) - _REASONS_LOGGED, "group"),
                batch,
                self._groups,
            )
        if not groups:
            return
        make_private_directory(self._directory)
        size = 0
        with open_private(self._groups, "ab") as file:
            for group in groups:
                file.write(json.dumps({"batch": batch, **vars(group)}).encode() + b"\n")
            size = file.tell()
        if size > self._max_bytes // _PARTS:
            # Never onto one that is there: a run that was resumed may have come by the same batch before.
            part = self._directory / f"groups-{batch:06d}.jsonl"
            if not part.exists():
                self._groups.replace(part)
        self._prune()

    def keep_batch(self, body: bytes, *, batch: int, reason: str) -> None:
        """Write a whole batch as it came and log the reason."""
        make_private_directory(self._directory)
        path = self._directory / f"batch-{batch:06d}.json"
        write_private(path, body)
        logger.warning("Set aside batch %d, kept as %s: %s", batch, path, reason)
        self._prune()

    def _prune(self) -> None:
        """Delete the oldest files until the rest is within the bound."""
        files = sorted(self._files(), key=_age)
        sizes = {path: path.stat().st_size for path in files}
        total = sum(sizes.values())
        for path in files:
            if total <= self._max_bytes:
                return
            path.unlink()
            total -= sizes[path]
            self.pruned += 1
            logger.warning(
                "%s would take more than %d bytes (train.set_aside_max_bytes): deleted %s, its oldest file",
                self._directory,
                self._max_bytes,
                path.name,
            )

    def _files(self) -> Iterable[Path]:
        return (
            path
            for path in self._directory.iterdir()
            if path == self._groups or _NUMBERED.fullmatch(path.name)
        )


def _age(path: Path) -> tuple[float, str]:
    """Sorts by the batch, what is still being written last."""
    match = _NUMBERED.fullmatch(path.name)
    return (int(match[1]), path.name) if match is not None else (float("inf"), path.name)

"""What is not trained on is kept, with the reason: `<output_dir>/set_aside/`."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from trainer.samples import SetAside

logger = logging.getLogger(__name__)

_REASONS_LOGGED = 5  # groups of one batch that get a line of their own in the log


class SetAsideStore:
    """Keeps groups and whole batches that were not trained on, for inspection.

    Args:
        directory: Created when the first thing is set aside.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def forget_after(self, batch: int) -> None:
        """Drop the groups of later batches: a resumed run gets these batches again."""
        path = self._directory / "groups.jsonl"
        if not path.exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _is_of_batch_up_to(line, batch)]
        if len(kept) < len(lines):
            partial = path.with_suffix(".partial")
            partial.write_text("".join(kept), encoding="utf-8")
            partial.replace(path)

    def keep_groups(self, groups: list[SetAside], *, batch: int) -> None:
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
                "Set aside %d more groups of batch %d: see %s",
                len(groups) - _REASONS_LOGGED,
                batch,
                self._directory / "groups.jsonl",
            )
        if groups:
            self._directory.mkdir(parents=True, exist_ok=True)
            with (self._directory / "groups.jsonl").open("a", encoding="utf-8") as file:
                for group in groups:
                    file.write(json.dumps({"batch": batch, **vars(group)}) + "\n")

    def keep_batch(self, body: bytes, *, batch: int, reason: str) -> None:
        """Write a whole batch as it came and log the reason."""
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"batch-{batch:06d}.json"
        path.write_bytes(body)
        logger.warning("Set aside batch %d, kept as %s: %s", batch, path, reason)


def _is_of_batch_up_to(line: str, batch: int) -> bool:
    try:
        return bool(json.loads(line)["batch"] <= batch)
    except ValueError:  # cut off when the process died
        return False

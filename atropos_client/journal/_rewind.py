"""Decides whether a run can go on after the last batch that its checkpoint counts."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from atropos_client.errors import JournalMismatch
from schemas import count_of

Extent = tuple[int | None, int, int | None]
"""The last batch; how many came before the first; the first after a checkpoint whose body is gone."""


def extent_of(connection: sqlite3.Connection, after: int) -> Extent:
    """Look up what `require_rewind` has to know."""
    return tuple(
        connection.execute(
            "SELECT (SELECT max(number) FROM batches), (SELECT begin FROM state), (SELECT min(number) "
            "FROM batches WHERE number > ? AND number NOT IN (SELECT number FROM bodies))",
            (after,),
        ).fetchone()
    )


def require_rewind(directory: Path, after: int, extent: Extent, *, accept_loss: bool) -> bool:
    """See that a run can go on after batch `after`; returns whether the journal has batches up to there.

    Raises:
        JournalMismatch: It cannot.
    """
    last, begin, pruned = extent
    remedy = "start once with --journal.accept_loss true"
    if pruned is not None:
        counted = (
            f"the newest checkpoint counts {count_of(after, 'batch')}"
            if after
            else "no checkpoint counts a batch"
        )
        raise JournalMismatch(
            f"{counted}, and the journal {directory} has no body of batch {pruned} any more: it was deleted "
            "behind a later checkpoint. Put back the checkpoints that were beside it; or choose another "
            f"train.output_dir; or, to go on without these batches, move this journal away and {remedy}"
        )
    if after <= (begin if last is None else last):
        return True
    if last is not None:
        raise JournalMismatch(
            f"the checkpoint counts {count_of(after, 'batch')} but the journal {directory} ends with batch "
            f"{last}: they are not of the same run. Put back the one that is; or move this one away and "
            f"{remedy}, to go on from the checkpoint without it"
        )
    if not accept_loss:
        raise JournalMismatch(
            f"the checkpoint counts {count_of(after, 'batch')} but the journal {directory} is new or "
            "emptied. Put it back; or, if the run had none or what was fetched after the checkpoint may be "
            f"lost, {remedy}"
        )
    return False

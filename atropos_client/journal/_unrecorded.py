"""Bodies that the database did not take: files beside it, which the next start takes in.

A file's name says all that the ledger would: `unrecorded-<nanoseconds>-v<served version>-<sha256>.json`.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from atropos_client.errors import JournalDamaged, JournalNotWritten
from atropos_client.private_files import replace_private

logger = logging.getLogger(__name__)

_NAME: Final = re.compile(r"unrecorded-(\d+)-v(-?\d+)-([0-9a-f]{64})\.json")


@dataclass(frozen=True, kw_only=True)
class UnrecordedBody:
    """A body and what the ledger has to say of it."""

    path: Path
    body: bytes
    received_at: float
    served_version: int


def keep_unrecorded(directory: Path, body: bytes, *, received_at: float, served_version: int) -> Path | None:
    """Write a body to a file of its own; None: that cannot be written either."""
    nanoseconds, digest = round(received_at * 1e9), hashlib.sha256(body).hexdigest()
    path = directory / f"unrecorded-{nanoseconds}-v{served_version}-{digest}.json"
    try:
        replace_private(path, body, durable=True)
    except OSError as error:
        logger.critical("A batch of %d bytes is lost: it could be written nowhere: %s", len(body), error)
        return None
    return path


def unrecorded_bodies(directory: Path) -> Iterator[UnrecordedBody]:
    """Read what is kept, in the order of arrival.

    Raises:
        JournalDamaged: A file is not what was written.
        JournalNotWritten: It cannot be read.
    """
    for path in sorted(directory.glob("unrecorded-*.json")):
        name = _NAME.fullmatch(path.name)
        try:
            body = path.read_bytes()
        except OSError as error:
            raise JournalNotWritten(f"{path} cannot be read: {error.strerror}") from error
        if name is None or hashlib.sha256(body).hexdigest() != name[3]:
            raise JournalDamaged(
                f"{path} holds a batch that waits to be taken into the journal, and is not what was written; "
                "move it away to go on without it"
            )
        yield UnrecordedBody(
            path=path, body=body, received_at=int(name[1]) / 1e9, served_version=int(name[2])
        )

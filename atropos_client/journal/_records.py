"""Describes what the journal hands out, and its bounds."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from atropos_client.errors import JournalFull

Outcome = Literal["received", "trained", "set_aside", "skipped"]
"""Outcome of a batch: none yet; trained on; kept with a reason; passed over with a reason."""

UNKNOWN_VERSION: Final = -1


@dataclass(frozen=True, kw_only=True)
class JournalLimits:
    """Bounds on the space that the journal takes."""

    max_bytes: int = 64 << 30
    """Bytes on the disk that the journal may use; space of pruned bodies does not count."""
    min_free_bytes: int = 512 << 20
    """Bytes of the file system that stay free: checkpoints need room too."""
    expected_bytes: int = 32 << 20
    """Stored bytes that a coming batch may have; the largest one so far counts if it was larger."""

    def require_room(self, directory: Path, usage: JournalUsage, *, largest: int) -> None:
        """Make sure that one more batch fits.

        Args:
            directory: Of the journal.
            usage: Its space now.
            largest: Stored bytes of its largest batch so far.

        Raises:
            JournalFull: It may not fit; the message says what to do.
        """
        expected = max(self.expected_bytes, largest)
        if usage.used + expected > self.max_bytes:
            raise JournalFull(
                f"the journal {directory} uses {_mebibytes(usage.used)} and may use "
                f"{_mebibytes(self.max_bytes)}: no room for a batch of {_mebibytes(expected)}. Let it "
                "use more, or write checkpoints more often: bodies behind the oldest kept one are deleted"
            )
        free = shutil.disk_usage(directory).free
        # A body is written twice, to the log and from there to its place, which may be space used again.
        needed = expected + max(0, expected - usage.reusable)
        if free - needed < self.min_free_bytes:
            raise JournalFull(
                f"the disk of {directory} has {_mebibytes(free)} free: too little for a batch of "
                f"{_mebibytes(expected)} besides the {_mebibytes(self.min_free_bytes)} that stay "
                "free. No batch was taken from the API; make room and start again"
            )


def _mebibytes(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """One row of the ledger: a batch without its body."""

    number: int
    """Position in the order of arrival, from 1; never used twice."""
    received_at: float
    """Seconds since the epoch at which the body was whole."""
    served_version: int
    """Policy version that was served when it arrived; -1: unknown."""
    size: int
    """Bytes of the body, not compressed."""
    sha256: str
    """Of the body, not compressed; hexadecimal."""
    outcome: Outcome
    """Outcome."""
    step: int | None
    """Optimizer step that trained on it. None: none did."""
    reason: str | None
    """Why it was set aside or skipped. None: it was not."""
    skip_reason: str | None
    """Why it is to be set aside unread when the run comes to it. None: it is read."""
    stored_size: int | None
    """Bytes that the compressed body takes. None: it was pruned."""


@dataclass(frozen=True, kw_only=True)
class JournaledBatch:
    """A batch with its body, checksum verified."""

    entry: LedgerEntry
    body: bytes
    """The API's reply, decompressed, byte for byte."""


@dataclass(frozen=True, kw_only=True)
class RewindReport:
    """Reports a rewind."""

    waiting: int
    """Batches after the checkpoint, to be trained next."""
    undone: int
    """Number of them with an outcome that the checkpoint does not count."""


@dataclass(frozen=True, kw_only=True)
class JournalUsage:
    """Reports the space that the journal takes, in bytes."""

    used: int
    """Pages in use."""
    reusable: int
    """Pages of pruned bodies, used again by the next batches."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Reports a check of the whole journal."""

    batches: int
    """Rows of the ledger."""
    bodies: int
    """Bodies that were read and compared with their checksums."""
    problems: tuple[str, ...]
    """One line a problem; empty: there is none."""

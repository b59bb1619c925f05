"""Describes what fetching gives: one batch, and what was counted on the way."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Generic, TypeVar

from schemas import BatchReply

P = TypeVar("P")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FetchedBatch(Generic[P]):
    """One batch as it came."""

    reply: BatchReply
    """The parsed reply; all of its groups may have been rejected. Empty where the body is `unreadable`."""
    body: bytes
    """The reply's bytes, decompressed."""
    number: int = 0
    """Its number in the journal; 0: it is in none, batches are counted as they come."""
    position: str = ""
    """Digest of all batches that a recording has given up to this one; empty: it is from no recording."""
    served_version: int
    """Policy version that was served when it arrived; -1: unknown."""
    prepared: P | None = None
    """The prepared reply ahead; None: nothing yet."""
    failure: Exception | None = None
    """The error that `prepare` raised instead; raised again when this batch's turn has come."""
    unreadable: str | None = None
    """Why the body is no batch at all, to be set aside whole. None: it is one."""


@dataclass(frozen=True, kw_only=True)
class FetchCounters:
    """Counts everything that happened so far. All of them only grow."""

    polls: int = 0
    """``GET /batch`` requests begun."""
    batches: int = 0
    """Replies with a batch."""
    empty_replies: int = 0
    """Replies that said "not enough data yet"."""
    groups: int = 0
    """Groups that can be trained on."""
    sequences: int = 0
    """Sequences in those groups."""
    rejected_groups: int = 0
    """Groups that cannot be trained on."""
    binary_mask_groups: int = 0
    """Groups whose 0/1 masks were converted."""
    bytes: int = 0
    """Bytes of JSON in replies with a batch."""
    possibly_lost: int = 0
    """Polls that failed after the server may have removed a batch."""
    unreadable: int = 0
    """Replies that came whole and are no batch at all; each is handed on, to be set aside."""
    failed_requests: int = 0
    """Other requests that failed, for example while the API was down."""
    registrations: int = 0
    """Successful registrations, the first included."""
    re_registrations: int = 0
    """Registrations after the first, because the API had forgotten us."""


def count_groups(reply: BatchReply) -> dict[str, int]:
    """Count what a batch holds, under the names of `FetchCounters`."""
    return {
        "groups": len(reply.groups),
        "sequences": sum(group.sequence_count for group in reply.groups),
        "rejected_groups": len(reply.rejected),
        "binary_mask_groups": sum(group.masks_were_binary for group in reply.groups),
    }


def warn_of_rejected(reply: BatchReply, number: int) -> None:
    """Log how many groups of a batch cannot be trained on, and why the first cannot."""
    if reply.rejected:
        first = reply.rejected[0]
        logger.warning(
            "Batch %d: %d of %d groups cannot be trained on; the first is group %d of environment %s: %s",
            number,
            len(reply.rejected),
            len(reply.groups) + len(reply.rejected),
            first.index,
            first.env_id,
            first.reason,
        )

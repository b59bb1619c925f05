"""What the poller hands out: one fetched batch, and a snapshot of its counters."""

from __future__ import annotations

from dataclasses import dataclass

from schemas import BatchReply


@dataclass(frozen=True, kw_only=True)
class PolledBatch:
    """One batch as it arrived."""

    number: int
    """Position among the batches of this poller, from 1; from a journal, its number there."""

    reply: BatchReply
    """The parsed reply; its state is ``"ready"``. All of its groups may have been rejected. Where the body is
    `unreadable` there is none, and its state is ``"waiting"``."""

    body: bytes
    """The JSON that was parsed, decompressed."""

    tag: object
    """What the poller's `tag` callable returned on arrival, for example the policy version then served."""

    received_at: float
    """Seconds since the epoch at which the body was whole."""

    prepared: object = None
    """What the poller's `prepare` callable made of the reply."""

    failure: Exception | None = None
    """What `prepare` raised instead; for whoever takes the batch to raise when its turn has come."""

    unreadable: str | None = None
    """Why the body is no batch at all, to be set aside whole. None: it is one."""

    @property
    def sequence_count(self) -> int:
        """Sequences in the groups that can be trained on."""
        return sum(group.sequence_count for group in self.reply.groups)


@dataclass(frozen=True, kw_only=True)
class PollerCounters:
    """Everything that happened so far. All of them only grow."""

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

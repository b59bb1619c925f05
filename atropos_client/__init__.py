"""Speaking HTTP to the Atropos API: clients, the background poller, and everything that can go wrong.

Imports `schemas`, httpx and the standard library; never torch.
"""

from __future__ import annotations

from atropos_client._async_client import AsyncAtroposClient
from atropos_client._body import BodyReader
from atropos_client._calls import parse_batch
from atropos_client._client import AtroposClient
from atropos_client._poller import BatchPoller
from atropos_client._records import PolledBatch, PollerCounters
from atropos_client._retry import NO_RETRIES, RetryPolicy
from atropos_client._settings import DEFAULT_MAX_BODY_BYTES, Timeouts
from atropos_client.errors import (
    AccessDenied,
    ApiUnreachable,
    AtroposClientError,
    BadReply,
    BatchNotRecorded,
    BatchPossiblyLost,
    BatchTimeout,
    ConnectionLost,
    ErrorStatus,
    FetcherDied,
    InvalidReply,
    JournalDamaged,
    JournalError,
    JournalFull,
    JournalLocked,
    JournalMismatch,
    JournalNotWritten,
    NoSuchBatch,
    PollerStopped,
    ReplyTimeout,
    ReplyTooLarge,
    RequestFailed,
    ServerError,
    UnreadableBatch,
)

__all__ = [
    "DEFAULT_MAX_BODY_BYTES",
    "NO_RETRIES",
    "AccessDenied",
    "ApiUnreachable",
    "AsyncAtroposClient",
    "AtroposClient",
    "AtroposClientError",
    "BadReply",
    "BatchNotRecorded",
    "BatchPoller",
    "BatchPossiblyLost",
    "BatchTimeout",
    "BodyReader",
    "ConnectionLost",
    "ErrorStatus",
    "FetcherDied",
    "InvalidReply",
    "JournalDamaged",
    "JournalError",
    "JournalFull",
    "JournalLocked",
    "JournalMismatch",
    "JournalNotWritten",
    "NoSuchBatch",
    "PolledBatch",
    "PollerCounters",
    "PollerStopped",
    "ReplyTimeout",
    "ReplyTooLarge",
    "RequestFailed",
    "RetryPolicy",
    "ServerError",
    "Timeouts",
    "UnreadableBatch",
    "parse_batch",
]

"""Speaks HTTP to the Atropos API: the client, and everything that can go wrong; see `fetcher` and `journal`.

Imports `schemas`, httpx and the standard library; never torch.
"""

from __future__ import annotations

from atropos_client._body import BodyReader
from atropos_client._client import AtroposClient
from atropos_client._reading import parse_batch
from atropos_client._retry import (
    NO_RETRIES,
    RetryPolicy,
    is_transient,
    send_within,
)
from atropos_client._settings import ConnectionSettings, Timeouts, client_options, is_loopback, redacted
from atropos_client._translate import translated_errors
from atropos_client.errors import (
    AccessDenied,
    ApiUnreachable,
    AtroposClientError,
    BadReply,
    BatchNotRecorded,
    BatchPossiblyLost,
    ConnectionLost,
    ErrorStatus,
    FetcherDied,
    FetcherStopped,
    InvalidReply,
    JournalDamaged,
    JournalError,
    JournalFull,
    JournalLocked,
    JournalMismatch,
    JournalNotWritten,
    NoSuchBatch,
    ReplyTimeout,
    ReplyTooLarge,
    RequestFailed,
    ServerError,
    UnreadableBatch,
)
from atropos_client.waiting import ask_environments, why_no_batch_is_full

__all__ = [
    "NO_RETRIES",
    "AccessDenied",
    "ApiUnreachable",
    "AtroposClient",
    "AtroposClientError",
    "BadReply",
    "BatchNotRecorded",
    "BatchPossiblyLost",
    "BodyReader",
    "ConnectionLost",
    "ConnectionSettings",
    "ErrorStatus",
    "FetcherDied",
    "FetcherStopped",
    "InvalidReply",
    "JournalDamaged",
    "JournalError",
    "JournalFull",
    "JournalLocked",
    "JournalMismatch",
    "JournalNotWritten",
    "NoSuchBatch",
    "ReplyTimeout",
    "ReplyTooLarge",
    "RequestFailed",
    "RetryPolicy",
    "ServerError",
    "Timeouts",
    "UnreadableBatch",
    "ask_environments",
    "client_options",
    "is_loopback",
    "is_transient",
    "parse_batch",
    "redacted",
    "send_within",
    "translated_errors",
    "why_no_batch_is_full",
]

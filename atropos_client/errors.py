"""Errors between us and the Atropos API, as one tree.

::

    AtroposClientError (Exception)
    ├── RequestFailed                           no whole reply came
    │   ├── ApiUnreachable (ConnectionError)    nothing was sent: refused, unknown host, TLS, connect timeout
    │   ├── ReplyTimeout (TimeoutError)         sent, but no (whole) reply in time
    │   └── ConnectionLost (ConnectionError)    sent, then the connection broke or the body was cut off
    ├── BadReply                                a reply came and cannot be used
    │   ├── ErrorStatus                         an HTTP status other than 2xx, redirects included
    │   │   ├── AccessDenied (PermissionError)  401 or 403
    │   │   └── ServerError                     5xx
    │   └── InvalidReply (ValueError)           wrong content type, not JSON, wrong shape, broken gzip
    │       ├── ReplyTooLarge                   more bytes than the configured maximum
    │       └── UnreadableBatch                 a whole reply to GET /batch that is no batch; it was handed on
    ├── BatchPossiblyLost                       GET /batch failed after it may have removed a batch
    ├── BatchNotRecorded (OSError)              the journal refused a body; the message says where it is
    ├── FetcherStopped (RuntimeError)           Fetcher.get on one that is not running
    ├── FetcherDied (RuntimeError)              the fetching process ended again and again, or never started
    └── JournalError                            the journal on the disk; see atropos_client.journal
        ├── JournalFull (OSError)               no room for one more batch: said before the next poll
        ├── JournalNotWritten (OSError)         a write failed; nothing of it is in the journal
        ├── JournalLocked (BlockingIOError)     another process has the journal, or its run's directory
        ├── JournalDamaged (ValueError)         the file, or a body in it, is not what was written
        └── JournalMismatch (ValueError)        what is asked does not fit what the journal holds
            └── NoSuchBatch (LookupError)       no batch of this number, or its body was pruned

Every error of a request knows its `method` and `url`. All of them pickle, and none carries a header, so that
no token can reach a log through them.
"""

# Names read as the events that they are (BatchPossiblyLost), as in httpx and the standard library.
# ruff: noqa: N818

from __future__ import annotations


class AtroposClientError(Exception):
    """Base class of everything that this package raises on purpose."""

    def __init__(self, message: str, *, method: str | None = None, url: str | None = None) -> None:
        super().__init__(message)
        self.method = method
        """HTTP method of the request. None: the error is not about one request."""
        self.url = url
        """URL of the request, without credentials. None: the error is not about one request."""

    def __str__(self) -> str:
        message = str(self.args[0]) if self.args else ""
        return f"{self.method} {self.url}: {message}" if self.url else message


class RequestFailed(AtroposClientError):
    """No whole reply came."""


class ApiUnreachable(RequestFailed, ConnectionError):
    """The connection could not be made, so nothing was sent: always safe to repeat."""


class ReplyTimeout(RequestFailed, TimeoutError):
    """The request was sent, but no whole reply came in time; the server may have acted on it."""


class ConnectionLost(RequestFailed, ConnectionError):
    """The connection broke after the request was sent; the server may have acted on it."""


class BadReply(AtroposClientError):
    """A reply came and cannot be used."""


class ErrorStatus(BadReply):
    """The server answered with an HTTP status other than 2xx; redirects are not followed and end here."""

    def __init__(
        self, message: str, *, status_code: int = 0, retry_after: float = 0.0, **request: str | None
    ) -> None:
        super().__init__(message, **request)
        self.status_code = status_code
        """The HTTP status."""
        self.retry_after = retry_after
        """Seconds that the server asks us to wait (Retry-After); 0.0 where it asks for none. Not bounded."""


class AccessDenied(ErrorStatus, PermissionError):
    """401 or 403: the proxy in front of the API does not accept our credentials."""


class ServerError(ErrorStatus):
    """5xx: the server, or a proxy in front of it, failed."""


class InvalidReply(BadReply, ValueError):
    """The reply is not what this route answers: content type, JSON syntax, shape, or compression."""


class ReplyTooLarge(InvalidReply):
    """The reply has more bytes, before or after decompression, than the configured maximum."""


class UnreadableBatch(InvalidReply):
    """A whole reply to ``GET /batch`` came that is no batch at all. Nothing is lost: its body was handed on.

    Raised only where nothing else has come for as long as one is patient.
    """


class BatchPossiblyLost(AtroposClientError):
    """``GET /batch`` failed in a way that may have cost a batch.

    The server removes a batch when it answers and keeps no copy. Whatever goes wrong after the request was
    sent may therefore have lost one; `__cause__` says what went wrong. Polling on is right, a silent
    repetition is not.
    """


class BatchNotRecorded(AtroposClientError, OSError):
    """The journal did not take a batch that the server no longer has; the message says where it is kept."""


class FetcherStopped(AtroposClientError, RuntimeError):
    """A batch was asked of a fetcher that was never started, or was stopped."""


class FetcherDied(AtroposClientError, RuntimeError):
    """The fetching process ended without saying why; or failed of what is none of these."""


class JournalError(AtroposClientError):
    """Something is wrong with the journal of batches."""


class JournalFull(JournalError, OSError):
    """There is no room for one more batch. Raised before a batch is taken from the API, so none is lost."""


class JournalNotWritten(JournalError, OSError):
    """The journal could not be written: disk full, quota, file system gone. Nothing was changed."""


class JournalLocked(JournalError, BlockingIOError):
    """Another process has the journal open for writing; the message names it."""


class JournalDamaged(JournalError, ValueError):
    """The journal is not what was written; the message names the file and says what to do."""

    def __init__(self, message: str, *, found: str | None = None, **request: str | None) -> None:
        super().__init__(message, **request)
        self.found = found or message
        """The fault, without what to do about it."""


class JournalMismatch(JournalError, ValueError):
    """A request to the journal does not fit what it holds, for example after it was deleted."""


class NoSuchBatch(JournalMismatch, LookupError):
    """There is no batch of this number, or its body was pruned."""

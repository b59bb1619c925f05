"""The life of one call, without I/O: send, judge the reply, repeat or give up.

A flow is a generator. It yields what it wants done (`Send` or `Pause`); a driver does it and sends back the
reply or throws the error in. The synchronous and the asynchronous client are two drivers of the same flows,
so that no decision is written twice.
"""

from __future__ import annotations

import gzip
import logging
import random
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar

import httpx

from atropos_client import _calls
from atropos_client._calls import Call
from atropos_client._retry import NO_RETRIES, RetryPolicy, pause_before_attempt, should_retry
from atropos_client._settings import ConnectionSettings
from atropos_client.errors import (
    AccessDenied,
    ApiUnreachable,
    AtroposClientError,
    BatchPossiblyLost,
    ErrorStatus,
    InvalidReply,
    RequestFailed,
    ServerError,
)

T = TypeVar("T")

logger = logging.getLogger(__name__)

_COMPRESS_FROM: Final = 1024  # bytes; below this, gzip costs more than it saves
_LONGEST_EXCERPT: Final = 300  # characters of an error reply that an error message quotes
_READY_PAUSE: Final = 0.2  # seconds between two looks at a server that is starting
_REMIND_SECONDS: Final = 15.0  # between two log lines that say that we still wait for it


@dataclass(frozen=True)
class Send:
    """Wish of a flow: send this and give me the reply, whatever its status."""

    call: Call[Any]


@dataclass(frozen=True)
class Pause:
    """Wish of a flow: wait this long."""

    seconds: float


@dataclass(frozen=True)
class Reply:
    """A whole reply; the body is decompressed."""

    status_code: int
    headers: httpx.Headers
    body: bytes


Flow: TypeAlias = Generator[Send | Pause, Reply | None, T]


def encode_request(call: Call[Any]) -> tuple[dict[str, str], bytes | None]:
    """Return the extra headers and the body to send, compressed where that pays."""
    if call.body is None:
        return {}, None
    headers = {"Content-Type": "application/json"}
    if len(call.body) < _COMPRESS_FROM:
        return headers, call.body
    headers["Content-Encoding"] = "gzip"
    # Level 1: numbers as text compress about as well, several times faster. mtime=0: always the same bytes.
    return headers, gzip.compress(call.body, compresslevel=1, mtime=0)


def worth_keeping(response: httpx.Response) -> bool:
    """Whether the connection of a reply may carry another request.

    After an unhandled exception uvicorn answers 500 and closes the connection without announcing it. A
    request sent into such a connection is reset, which would look like a second lost batch. A driver
    therefore leaves these replies before their end, which makes httpx close the connection; the first piece
    is enough for the error message.
    """
    return response.status_code < 500


def exchange(call: Call[T], policy: RetryPolicy, settings: ConnectionSettings) -> Flow[T]:
    """Send one call, repeating it within the policy where that is safe.

    Raises:
        BatchPossiblyLost: If the call removes a batch and failed after it may have been sent.
        AtroposClientError: Whatever the last sending failed of.
    """
    started = time.monotonic()
    attempts = 0
    while True:
        attempts += 1
        try:
            reply = yield Send(call)
            return _read(call, reply, settings)
        except AtroposClientError as error:
            _locate(error, call, settings)
            pause = pause_before_attempt(attempts + 1, policy, fraction=random.random())  # noqa: S311 - jitter
            if not should_retry(
                error,
                resend=call.resend,
                attempts_made=attempts,
                elapsed=time.monotonic() - started,
                pause=pause,
                policy=policy,
            ):
                if call.removes_batch and _may_have_removed(error):
                    raise possibly_lost(error) from error
                raise
        yield Pause(pause)


def wait_until_ready(deadline: float, settings: ConnectionSettings) -> Flow[None]:
    """Ask until anything answers properly.

    Args:
        deadline: Seconds from now.
        settings: Where to ask.

    Raises:
        ApiUnreachable: If nothing answered in time; the cause says what came last.
        ErrorStatus: If the answer is one that waiting does not change, such as a refused token.
    """
    started = time.monotonic()
    end, remind_at = started + deadline, started
    while True:
        try:
            yield from exchange(_calls.greeting(), NO_RETRIES, settings)
        except (RequestFailed, ServerError) as error:
            now = time.monotonic()
            if now >= remind_at:
                remind_at = now + _REMIND_SECONDS
                logger.info(
                    "waiting for the Atropos API at %s, for %.0f s of %g s: %s",
                    settings.base_url,
                    now - started,
                    deadline,
                    error,
                )
            if now + _READY_PAUSE > end:
                raise ApiUnreachable(
                    f"the Atropos API at {settings.base_url} was not ready within {deadline:g} s: {error}"
                ) from error
        else:
            return
        yield Pause(_READY_PAUSE)


def possibly_lost(error: AtroposClientError) -> BatchPossiblyLost:
    """Say of a failed ``GET /batch`` that it may have cost a batch."""
    return BatchPossiblyLost(
        f"a batch is possibly lost, because the server removes what it answers: {error.args[0]}",
        method=error.method,
        url=error.url,
    )


def _may_have_removed(error: AtroposClientError) -> bool:
    """Whether the server may have taken a batch off its queue although we have none."""
    if isinstance(error, ApiUnreachable):
        return False
    # Below 500 the request was turned away before the route ran.
    return not isinstance(error, ErrorStatus) or isinstance(error, ServerError)


def _read(call: Call[T], reply: Reply | None, settings: ConnectionSettings) -> T:
    """Judge a reply by status and content type, then parse it."""
    if reply is None:
        raise RuntimeError("a driver must answer Send with a reply")  # a defect of ours, not of the server
    if not 200 <= reply.status_code < 300:
        raise _status_error(reply, settings)
    if call.expects_json:
        content_type = reply.headers.get("content-type", "none").split(";")[0].strip().lower()
        if content_type != "application/json" and not content_type.endswith("+json"):
            raise InvalidReply(
                f"the reply is of content type {content_type!r}, not JSON: "
                f"is this the Atropos API? It begins with {_excerpt(reply, settings)}"
            )
    return call.parse(reply.body)


def _status_error(reply: Reply, settings: ConnectionSettings) -> ErrorStatus:
    code = reply.status_code
    said = _excerpt(reply, settings)
    if code in {401, 403}:
        return AccessDenied(
            f"access denied with status {code}: check the token and headers. The server said {said}",
            status_code=code,
        )
    if 300 <= code < 400:
        return ErrorStatus(
            f"redirected with status {code} to {_target(reply, settings)!r}, and redirects are not "
            "followed: configure the final address",
            status_code=code,
        )
    kind = ServerError if code >= 500 else ErrorStatus
    return kind(
        f"status {code}. The server said {said}", status_code=code, retry_after=_retry_after(reply.headers)
    )


def _target(reply: Reply, settings: ConnectionSettings) -> str:
    """Where a redirect leads, without what may be secret in it."""
    try:
        target = httpx.URL(reply.headers.get("location", "")).copy_with(query=None, userinfo=b"")
    except httpx.InvalidURL:
        return "an address that is none"
    return settings.redact(str(target))[:_LONGEST_EXCERPT]


def _retry_after(headers: httpx.Headers) -> float:
    """Seconds of a Retry-After header; 0.0 for none, and for a date, which would ask for the wall clock."""
    value = headers.get("retry-after", "").strip()
    return float(value) if value.isascii() and value.isdecimal() else 0.0


def _excerpt(reply: Reply, settings: ConnectionSettings) -> str:
    # Redact before cutting: half a token is a leak too.
    text = settings.redact(reply.body[: 16 * _LONGEST_EXCERPT].decode("utf-8", errors="replace")).strip()
    return repr(text[:_LONGEST_EXCERPT] + ("..." if len(text) > _LONGEST_EXCERPT else ""))


def _locate(error: AtroposClientError, call: Call[Any], settings: ConnectionSettings) -> None:
    """Tell an error which request it is about."""
    error.method = call.method
    error.url = settings.base_url + call.path

"""Sends one call, judges the reply, and repeats it or gives up."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import httpx

from atropos_client._calls import Call
from atropos_client._retry import RetryPolicy, send_within
from atropos_client._settings import ConnectionSettings
from atropos_client.errors import (
    AccessDenied,
    ApiUnreachable,
    AtroposClientError,
    BatchPossiblyLost,
    ErrorStatus,
    InvalidReply,
    ServerError,
)

T = TypeVar("T")

_COMPRESS_FROM: Final = 1024  # bytes; below this, gzip costs more than it saves
_LONGEST_EXCERPT: Final = 300  # characters of an error reply that an error message quotes


@dataclass(frozen=True)
class Reply:
    """A whole reply; the body is decompressed."""

    status_code: int
    headers: httpx.Headers
    body: bytes


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
    request sent into such a connection is reset, which would look like a second lost batch. The client
    therefore leaves these replies before their end, which makes httpx close the connection; the first piece
    is enough for the error message.
    """
    return response.status_code < 500


def exchange(
    call: Call[T], send: Callable[[Call[T]], Reply], policy: RetryPolicy, settings: ConnectionSettings
) -> T:
    """Send one call, repeating it within the policy where that is safe.

    Args:
        call: What to send, and how to read the reply.
        send: Sends it once and returns the reply, whatever its status.
        policy: Bounds on repeating.
        settings: Of the connection.

    Raises:
        BatchPossiblyLost: If the call removes a batch and failed after it may have been sent.
        AtroposClientError: Whatever the last sending failed of.
    """
    try:
        return send_within(policy, lambda: _read(call, send(call), settings), call.resend)
    except AtroposClientError as error:
        error.method = call.method
        error.url = settings.base_url + call.path
        if call.removes_batch and _may_have_removed(error):
            raise possibly_lost(error) from error
        raise


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


def _read(call: Call[T], reply: Reply, settings: ConnectionSettings) -> T:
    """Judge a reply by status and content type, then parse it."""
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

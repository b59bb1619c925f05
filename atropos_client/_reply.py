"""Judges a reply: by its status, its content type, and whether a batch may be lost with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import httpx

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

_LONGEST_EXCERPT: Final = 300  # characters of an error reply that an error message quotes


@dataclass(frozen=True)
class Reply:
    """A whole reply; the body is decompressed."""

    status_code: int
    headers: httpx.Headers
    body: bytes


def possibly_lost(error: AtroposClientError) -> BatchPossiblyLost:
    """Say of a failed ``GET /batch`` that it may have cost a batch."""
    return BatchPossiblyLost(
        f"a batch is possibly lost, because the server removes what it answers: {error.args[0]}",
        method=error.method,
        url=error.url,
    )


def may_have_removed(error: AtroposClientError) -> bool:
    """Whether the server may have taken a batch off its queue although we have none."""
    if isinstance(error, ApiUnreachable):
        return False
    # Below 500 the request was turned away before the route ran.
    return not isinstance(error, ErrorStatus) or isinstance(error, ServerError)


def judge(reply: Reply, settings: ConnectionSettings, *, expects_json: bool) -> bytes:
    """Return the body of a reply that can be used.

    Raises:
        BadReply: It has another status than 2xx, or is not labelled as JSON where that is expected.
    """
    if not 200 <= reply.status_code < 300:
        raise _status_error(reply, settings)
    content_type = reply.headers.get("content-type", "none").split(";")[0].strip().lower()
    if expects_json and content_type != "application/json" and not content_type.endswith("+json"):
        raise InvalidReply(
            f"the reply is of content type {content_type!r}, not JSON: "
            f"is this the Atropos API? It begins with {_excerpt(reply, settings)}"
        )
    return reply.body


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

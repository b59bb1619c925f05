"""Turns exceptions of httpx into exceptions of ours; the only place that does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import httpx

from atropos_client.errors import (
    ApiUnreachable,
    AtroposClientError,
    ConnectionLost,
    ReplyTimeout,
    RequestFailed,
)

# Most specific first: the first matching class wins.
_TRANSLATIONS: Final[tuple[tuple[type[httpx.HTTPError], type[AtroposClientError], str], ...]] = (
    (httpx.ConnectTimeout, ApiUnreachable, "no connection in time; is the host right and reachable?"),
    (httpx.PoolTimeout, ApiUnreachable, "all connections are busy; close clients or send less at once"),
    (
        httpx.ConnectError,
        ApiUnreachable,
        "cannot connect; does the Atropos API run (run-api) at this address?",
    ),
    (httpx.ProxyError, ApiUnreachable, "the proxy refused the connection"),
    (httpx.UnsupportedProtocol, RequestFailed, "not an HTTP address"),
    (httpx.LocalProtocolError, RequestFailed, "the request is not valid HTTP; check token and headers"),
    (httpx.TimeoutException, ReplyTimeout, "no reply in time"),
    (httpx.RemoteProtocolError, ConnectionLost, "the connection ended before the reply was whole"),
    (httpx.NetworkError, ConnectionLost, "the connection broke after the request was sent"),
    (httpx.HTTPError, RequestFailed, "the request failed"),
)


@contextmanager
def translated_errors() -> Iterator[None]:
    """Translate what httpx raises inside the block; works around `await` as well."""
    try:
        yield
    except httpx.HTTPError as error:
        _, ours, meaning = next(row for row in _TRANSLATIONS if isinstance(error, row[0]))
        # httpx quotes illegal header values in LocalProtocolError, and ours may be secret.
        secret = isinstance(error, httpx.LocalProtocolError)
        detail = "" if secret else f" ({str(error) or type(error).__name__})"
        raise ours(f"{meaning}{detail}") from (None if secret else error)

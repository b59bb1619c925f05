"""Decides who may see the page of a run.

On loopback: whoever asks for this machine by a name that means loopback. A page of another site whose name
was made to point here (DNS rebinding) asks by its own name, and is refused. With a token: whoever has it, by
any name. Bound elsewhere without a token: nobody.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Mapping
from http import HTTPStatus
from typing import Final
from urllib.parse import parse_qs

from trainer.errors import ConfigurationError
from trainer.monitoring.server import PageReply, PageRequest

TOKEN_VARIABLE: Final = "ATROPOS_VIEW_TOKEN"  # noqa: S105 - its name, not its value
"""Environment variable that holds the token."""
_COOKIE: Final = "atropos_view"
_SHORTEST_TOKEN: Final = 16


class Access:
    """The rule for one server.

    Args:
        host: Address that it is bound to.
        token: What to ask for. None: nothing, on loopback; elsewhere the page is not shown.

    Raises:
        ConfigurationError: The token is too short, or no ASCII.
    """

    def __init__(self, host: str, token: str | None) -> None:
        if token is not None and (len(token) < _SHORTEST_TOKEN or not token.isascii()):
            raise ConfigurationError(f"{TOKEN_VARIABLE} must have {_SHORTEST_TOKEN} ASCII characters or more")
        self._token = token
        self.is_open = token is not None or is_loopback(host)
        """Whether anybody can see the page."""

    @classmethod
    def of_environment(cls, host: str, environment: Mapping[str, str] = os.environ) -> Access:
        """The rule with the token of the environment.

        Raises:
            ConfigurationError: See the class.
        """
        return cls(host, environment.get(TOKEN_VARIABLE) or None)

    def refusal(self, request: PageRequest) -> PageReply | None:
        """What to answer instead of the page; None: it may be seen."""
        if request.headers.get("sec-fetch-site") == "cross-site" and request.path != "/":
            return refuse(HTTPStatus.FORBIDDEN, "another site asked for it")
        if self._token is None:
            if not self.is_open:
                return refuse(
                    HTTPStatus.FORBIDDEN, f"the page is shown beyond loopback only with {TOKEN_VARIABLE} set"
                )
            if not is_loopback(_host_of(request)):
                return refuse(HTTPStatus.MISDIRECTED_REQUEST, "ask for it as localhost or 127.0.0.1")
            return None
        return self._unless_known(request, self._token)

    def _unless_known(self, request: PageRequest, token: str) -> PageReply | None:
        given = parse_qs(request.query).get("token", [""])[0]
        digest = hashlib.sha256(token.encode()).hexdigest()
        if given and _equal(given, token) and request.path == "/":
            cookie = f"{_COOKIE}={digest}; Path=/; HttpOnly; SameSite=Strict"
            headers = (("Location", "/"), ("Set-Cookie", cookie))
            return PageReply(HTTPStatus.SEE_OTHER, "text/plain; charset=utf-8", b"", headers)
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        cookies = dict(
            part.strip().split("=", 1) for part in request.headers.get("cookie", "").split(";") if "=" in part
        )
        if _equal(bearer, token) or _equal(cookies.get(_COOKIE, ""), digest):
            return None
        return refuse(HTTPStatus.UNAUTHORIZED, "open /?token=... with the token, or send it as Bearer")


def refuse(status: HTTPStatus, why: str) -> PageReply:
    """A refusal in words."""
    return PageReply(status, "text/plain; charset=utf-8", f"{status.phrase}: {why}\n".encode())


def is_loopback(host: str) -> bool:
    """Whether a name or an address, without a port, is this machine's own."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _host_of(request: PageRequest) -> str:
    host = request.headers.get("host", "")
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _equal(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())

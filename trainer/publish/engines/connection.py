"""Sends one request to one inference server, inside one deadline.

How a reply is read, which errors there are and when a request is sent again is `atropos_client`'s; here they
become the failure of a publish's phase.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from http import HTTPStatus
from typing import Any, TypedDict, TypeVar, Unpack

import httpx
from pydantic import BaseModel, SecretStr, ValidationError

from atropos_client import (
    ApiUnreachable,
    AtroposClientError,
    BodyReader,
    ErrorStatus,
    ReplyTimeout,
    RetryPolicy,
    client_options,
    is_transient,
    redacted,
    send_within,
    translated_errors,
)
from atropos_client.clock import running_time
from trainer.config import plain_url
from trainer.publish.errors import Phase, PhaseDeadlineExceeded, ServerFailure

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 5.0
"""Seconds. A server that is up accepts at once; a host that is off answers nothing at all."""

REMIND_SECONDS = 15.0
"""Between two log lines that say that a server is still waited for at the start."""

MAX_REPLY_BYTES = 64 << 20
"""Replies are small; anything larger is not the server we think it is."""

RETRIES = RetryPolicy(attempts=4, first_pause=0.2, longest_pause=2.0)
"""Outside start-up. That bridges about a second: a dropped connection or a proxy that reloads, not a server
that is gone. The phase's deadline ends it sooner."""

_LONGEST_SAID = 4096  # bytes of a reply that are looked at for a message

Answer = TypeVar("Answer", bound=BaseModel)


class Deadline:
    """Marks the moment by which a phase has to be over: so many seconds from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._ends_at = running_time() + seconds

    @property
    def left(self) -> float:
        """Seconds left; never negative."""
        return max(0.0, self._ends_at - running_time())


class How(TypedDict, total=False):
    """Keyword arguments of one request."""

    deadline: Deadline | None
    """Ends all attempts. Default: the phase's own seconds from now."""
    once: bool
    """Whether a second sending would do work or damage: only sent again if it certainly never arrived."""
    starting: bool
    """Whether the server may not be up yet: sent again until the deadline."""
    body: BaseModel | Mapping[str, Any] | None
    """Sent as JSON; of a model only the fields that were set."""
    query: Mapping[str, str]


class ServerConnection:
    """Speaks HTTP to one server. Safe to use from one thread at a time.

    Args:
        url: Base URL.
        token: Bearer token.
        headers: Further headers; secrets, like the token.
        seconds: Allowance of each phase, for calls without a deadline of their own.
        remedies: What to do about a status or about a failure of a phase, in the engine's words.
    """

    def __init__(
        self,
        url: str,
        *,
        token: SecretStr | None = None,
        headers: Mapping[str, SecretStr] | None = None,
        seconds: Mapping[Phase, float] | None = None,
        remedies: Mapping[Phase | int, str] | None = None,
    ) -> None:
        self.url = plain_url(url)
        """The base URL without credentials, as every message shows it."""
        self.version: int | None = None
        """The version that is being published, for messages; None before the first."""
        # uvicorn, which serves vLLM and SGLang, closes a connection after 5 idle seconds and after an error
        # of a route. What is sent meanwhile gets no answer, and a step of a transfer is sent only once.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._client = httpx.Client(**client_options(url, token=token, headers=headers or {}, limits=limits))
        self._seconds = seconds or {}
        self._remedies = remedies or {}
        self._secrets = [token, *(headers or {}).values()]

    def close(self) -> None:
        """Let go of the client."""
        self._client.close()

    def ask(self, kind: type[Answer], route: str, phase: Phase, **how: Unpack[How]) -> Answer:
        """Send a request as `call` does, and return its reply as a `kind`.

        Raises:
            ServerFailure: As `call`; or the reply is not of the expected shape.
        """
        return self._read(kind, route, phase, self.call(route, phase, **how))

    def ask_if_known(self, kind: type[Answer], route: str, phase: Phase, **how: Unpack[How]) -> Answer | None:
        """Send a request as `ask` does; None from a server that has no such route."""
        content = self.call_if_known(route, phase, **how)
        return None if content is None else self._read(kind, route, phase, content)

    def call_if_known(self, route: str, phase: Phase, **how: Unpack[How]) -> bytes | None:
        """Send a request as `call` does; None from a server that has no such route."""
        try:
            return self.call(route, phase, **how)
        except ServerFailure as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            return None

    @contextlib.contextmanager
    def reading(self, route: str, phase: Phase) -> Iterator[None]:
        """Turn what is wrong with a reply's content, a ValueError, into the failure of the phase."""
        try:
            yield
        except ValueError as error:
            raise self.failure(phase, f"{route}: {error}") from error

    def call(self, route: str, phase: Phase, **how: Unpack[How]) -> bytes:
        """Send a request, again where that is safe, and return the body of a reply that means success.

        Args:
            route: Method and path, for example `POST /pause`.
            phase: The step of a publish that it belongs to.
            how: See `How`.

        Raises:
            PhaseDeadlineExceeded: The deadline passed first.
            ServerFailure: No connection, an error status, or a 200 whose body says that it failed.
        """
        deadline = how.get("deadline") or Deadline(self._seconds[phase])
        starting = how.get("starting", False)
        policy = replace(
            RETRIES, attempts=sys.maxsize if starting else RETRIES.attempts, wall_clock=deadline.left
        )
        body = how.get("body")
        if isinstance(body, BaseModel):
            body = body.model_dump(mode="json", exclude_unset=True)
        remind_at = running_time()

        def announce(error: AtroposClientError) -> None:
            nonlocal remind_at
            logger.debug("%s: %s: %s", self.url, route, reason_of(error))
            if starting and running_time() >= remind_at:
                remind_at = running_time() + REMIND_SECONDS
                waits = (self.url, deadline.left, reason_of(error))
                logger.info("waiting for the inference server %s, for %.0f s more: %s", *waits)

        try:
            return send_within(
                policy,
                lambda: self._send(route, deadline, json=body, params=how.get("query")),
                once=how.get("once", False),
                before_pause=announce,
            )
        except AtroposClientError as error:
            # A server that is still starting when the time is up has missed the deadline as well.
            late = isinstance(error, ReplyTimeout) or (starting and is_transient(error))
            limit = f"not within {deadline.seconds:g} s: " if late else ""
            raise self.failure(
                phase,
                f"{route}: {limit}{reason_of(error)}",
                PhaseDeadlineExceeded if late else ServerFailure,
                status=error.status_code if isinstance(error, ErrorStatus) else None,
                server_text=self._said(error.content) if isinstance(error, _Refused) else "",
            ) from error

    def failure(
        self, phase: Phase, reason: str, kind: type[ServerFailure] = ServerFailure, **more: Any
    ) -> ServerFailure:
        """Make the error of a phase at this server; `more`: see `ServerFailure`."""
        if kind is ServerFailure:
            remedy = self._remedies.get(more.get("status", 0)) or self._remedies.get(phase)
            more = {"remedy": remedy} | more
        return kind(reason, server=self.url, phase=phase, version=self.version, **more)

    def exchange(self, route: str, *, seconds: float, **more: Any) -> httpx.Response:
        """Send a request once, and return the reply whatever its status.

        Args:
            route: Method and path.
            seconds: For all of it.
            more: What httpx takes: `json`, `params`.

        Raises:
            AtroposClientError: No whole reply came, or one that is too large.
        """
        if seconds == 0.0:
            raise ReplyTimeout("the phase's time is spent")
        method, path = route.split(" ", 1)
        timeout = httpx.Timeout(seconds, connect=min(CONNECT_TIMEOUT, seconds))
        reader = BodyReader(limit=MAX_REPLY_BYTES, patience=seconds)
        with (
            translated_errors(),
            self._client.stream(method, path, timeout=timeout, **more) as response,
        ):
            content = reader.read(response)
            return httpx.Response(response.status_code, content=content, request=response.request)

    def _send(self, route: str, deadline: Deadline, **more: Any) -> bytes:
        """Send a request once, and return the body of a reply that means success."""
        response = self.exchange(route, seconds=deadline.left, **more)
        status, content = response.status_code, response.content
        if status == HTTPStatus.BAD_REQUEST and _json_object(content).get("success") is False:
            # Understood, and its work failed: unlike other refusals, worth another try.
            raise _Refused(f"HTTP {status}", HTTPStatus.OK, content)
        if status != HTTPStatus.OK:
            raise _Refused(f"HTTP {status}", status, content)
        if says_failed(content):
            raise _Refused("HTTP 200, but the reply says that it failed", status, content)
        return content

    def _read(self, kind: type[Answer], route: str, phase: Phase, content: bytes) -> Answer:
        try:
            return kind.model_validate_json(content)
        except ValidationError as error:
            details = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(part) for part in details["loc"]) or "the body"
            found = f"{route}: the reply is not a {kind.__name__}: {place}: {details['msg']}"
            raise self.failure(phase, found, server_text=self._said(content)) from error

    def _said(self, content: bytes) -> str:
        """Return what a server said, for a message, without the secrets that we sent it."""
        # Redacted before anybody cuts it: half of a token is a leak too.
        return redacted(content[:_LONGEST_SAID].decode("utf-8", "replace"), self._secrets)


class _Refused(ErrorStatus):
    """A whole reply came, and does not mean success."""

    def __init__(self, message: str, status: int, content: bytes) -> None:
        super().__init__(message, status_code=status)
        self.content = content


def reason_of(error: AtroposClientError) -> str:
    """Say why no usable reply came, in httpx's words: the client's own speak of the Atropos API."""
    if isinstance(error, ReplyTimeout):
        return "no complete reply"
    cause = error.__cause__
    if cause is None:
        return str(error)
    if isinstance(error, ApiUnreachable):
        return f"no connection ({cause})"
    return f"{type(cause).__name__}: {cause}"


def says_failed(content: bytes) -> bool:
    """Tell whether the body of a 200 reply says that the request failed after all."""
    parsed = _json_object(content)
    return parsed.get("success") is False or bool(parsed.get("error")) or parsed.get("object") == "error"


def _json_object(content: bytes) -> dict[str, Any]:
    """Return a body that is a JSON object; an empty one for any other."""
    with contextlib.suppress(ValueError, RecursionError):  # nested too deeply to say anything
        parsed = json.loads(content)
        if isinstance(parsed, dict):
            return parsed
    return {}

"""Sends one request to one inference server, inside one deadline.

How a reply is read, which errors there are and when a request is sent again is `atropos_client`'s; here they
become the failure of a publish's phase.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from types import TracebackType
from typing import Any, Literal, Required, Self, TypedDict, TypeVar, Unpack

import httpx
from pydantic import BaseModel, SecretStr, ValidationError

from atropos_client import (
    ApiUnreachable,
    AtroposClientError,
    BodyReader,
    ErrorStatus,
    ReplyTimeout,
    Resend,
    RetryPolicy,
    client_options,
    is_transient,
    may_resend,
    translated_errors,
)
from atropos_client.backoff import Backoff
from atropos_client.clock import running_time
from trainer.config import PublishSettings, plain_url
from trainer.publish.errors import PHASE_ERRORS, Phase, PhaseDeadlineExceeded, ServerFailure

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
Method = Literal["GET", "POST"]


@dataclass(frozen=True)
class Deadline:
    """Marks the moment by which a phase has to be over."""

    seconds: float
    """The whole allowance."""
    ends_at: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends_at", running_time() + self.seconds)

    @property
    def left(self) -> float:
        """Seconds left; never negative."""
        return max(0.0, self.ends_at - running_time())


def phase_seconds(settings: PublishSettings) -> dict[Phase, float]:
    """Map each phase to the seconds that one request in it may take."""
    seconds = dict.fromkeys(Phase, settings.pause_timeout)
    seconds[Phase.LOAD] = settings.load_timeout
    seconds[Phase.VERIFY] = settings.verify_timeout
    return seconds


class Where(TypedDict):
    """Keyword arguments of everything that belongs to one phase."""

    phase: Phase
    version: int | None
    """For messages; None outside a publish."""


class Within(Where):
    """Keyword arguments that several requests under one deadline share."""

    deadline: Deadline


class CallOptions(TypedDict, total=False):
    """Keyword arguments of one request."""

    phase: Required[Phase]
    version: Required[int | None]
    """For messages; None outside a publish."""
    deadline: Deadline
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
        seconds: Allowance of each phase, for calls without a deadline of their own (`phase_seconds`).
        remedy_for: What to do about a failure of a phase with a status, in the engine's words; None: what the
            phase's error says.
    """

    def __init__(
        self,
        url: str,
        *,
        token: SecretStr | None = None,
        headers: Mapping[str, SecretStr] | None = None,
        seconds: Mapping[Phase, float] | None = None,
        remedy_for: Callable[[Phase, int | None], str | None] = lambda _phase, _status: None,
    ) -> None:
        self.url = plain_url(url)
        """The base URL without credentials, as every message shows it."""
        # uvicorn, which serves vLLM and SGLang, closes a connection after 5 idle seconds and after an error
        # of a route. What is sent meanwhile gets no answer, and a step of a transfer is sent only once.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._client = httpx.Client(**client_options(url, token=token, headers=headers or {}, limits=limits))
        self._seconds = seconds or {}
        self._remedy_for = remedy_for
        secrets = [token, *(headers or {}).values()]
        self._secrets = [secret.get_secret_value() for secret in secrets if secret is not None]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the client."""
        self._client.close()

    def ask(self, kind: type[Answer], method: Method, path: str, **options: Unpack[CallOptions]) -> Answer:
        """Send a request as `call` does, and return its reply as a `kind`.

        Raises:
            ServerFailure: As `call`; or the reply is not of the expected shape.
        """
        content = self.call(method, path, **options)
        try:
            return kind.model_validate_json(content)
        except ValidationError as error:
            details = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(part) for part in details["loc"]) or "the body"
            raise self._failure(
                f"{method} {path}: the reply is not a {kind.__name__}: {place}: {details['msg']}",
                options,
                server_text=self._said(content),
            ) from error

    def ask_if_known(
        self, kind: type[Answer], method: Method, path: str, **options: Unpack[CallOptions]
    ) -> Answer | None:
        """Send a request as `ask` does; None from a server that has no such route."""
        try:
            return self.ask(kind, method, path, **options)
        except ServerFailure as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            return None

    def call_if_known(self, method: Method, path: str, **options: Unpack[CallOptions]) -> bytes | None:
        """Send a request as `call` does; None from a server that has no such route."""
        try:
            return self.call(method, path, **options)
        except ServerFailure as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            return None

    @contextlib.contextmanager
    def reading(self, route: str, **where: Unpack[Where]) -> Iterator[None]:
        """Turn what is wrong with a reply's content, a ValueError, into the failure of the phase."""
        try:
            yield
        except ValueError as error:
            raise self._failure(f"{route}: {error}", where) from error

    def call(self, method: Method, path: str, **options: Unpack[CallOptions]) -> bytes:
        """Send a request, again where that is safe, and return the body of a reply that means success.

        Raises:
            PhaseDeadlineExceeded: The deadline passed first.
            ServerFailure: The phase's own error: no connection, an error status, or a 200 whose body
                says that it failed.
        """
        phase = options["phase"]
        deadline = options.get("deadline") or Deadline(self._seconds[phase])
        starting = options.get("starting", False)
        policy = replace(
            RETRIES, attempts=sys.maxsize if starting else RETRIES.attempts, wall_clock=deadline.left
        )
        resend = Resend.ONLY_IF_NOT_SENT if options.get("once") else Resend.HARMLESS
        body, query = options.get("body"), options.get("query")
        if isinstance(body, BaseModel):
            body = body.model_dump(mode="json", exclude_unset=True)
        pauses = Backoff(first=policy.first_pause, longest=policy.longest_pause)
        started = remind_at = running_time()
        for attempts in itertools.count(1):
            content, error = self._attempt(method, path, deadline, json=body, params=query)
            if error is None:
                return content
            pause = pauses.next()
            elapsed = running_time() - started
            if not policy.allows_another(attempts, elapsed + pause) or not may_resend(error, resend):
                # A server that is still starting when the time is up has missed the deadline as well.
                late = isinstance(error, ReplyTimeout) or (starting and is_transient(error))
                limit = f"not within {deadline.seconds:g} s: " if late else ""
                raise self._failure(
                    f"{method} {path}: {limit}{reason_of(error)}",
                    options,
                    late=late,
                    status=error.status_code if isinstance(error, ErrorStatus) else None,
                    server_text=self._said(content),
                ) from error
            logger.debug("%s: %s %s: attempt %d: %s", self.url, method, path, attempts, reason_of(error))
            if starting and running_time() >= remind_at:
                remind_at = running_time() + REMIND_SECONDS
                waits = (self.url, deadline.left, reason_of(error))
                logger.info("waiting for the inference server %s, for %.0f s more: %s", *waits)
            time.sleep(pause)
        raise AssertionError("counting does not end")

    def _attempt(
        self, method: Method, path: str, deadline: Deadline, **more: Any
    ) -> tuple[bytes, AtroposClientError | None]:
        """Send a request once; return what the server said, and what went wrong."""
        try:
            response = self.exchange(method, path, seconds=deadline.left, **more)
        except AtroposClientError as error:
            return b"", error
        status, content = response.status_code, response.content
        if status == HTTPStatus.BAD_REQUEST and _json_object(content).get("success") is False:
            # Understood, and its work failed: unlike other refusals, worth another try.
            return content, ErrorStatus(f"HTTP {status}", status_code=HTTPStatus.OK)
        if status != httpx.codes.OK:
            return content, ErrorStatus(f"HTTP {status}", status_code=status)
        if says_failed(content):
            return content, ErrorStatus("HTTP 200, but the reply says that it failed", status_code=status)
        return content, None

    def _failure(
        self,
        reason: str,
        where: Where | CallOptions,
        *,
        late: bool = False,
        status: int | None = None,
        server_text: str = "",
    ) -> ServerFailure:
        """Make the phase's own error, or the one of a deadline."""
        phase = where["phase"]
        kind = PhaseDeadlineExceeded if late else PHASE_ERRORS[phase]
        return kind(
            reason,
            server=self.url,
            phase=phase,
            version=where["version"],
            status=status,
            server_text=server_text,
            remedy=None if late else self._remedy_for(phase, status),
        )

    def exchange(self, method: Method, path: str, *, seconds: float, **more: Any) -> httpx.Response:
        """Send a request once, and return the reply whatever its status.

        Args:
            method: The HTTP method.
            path: Below the base URL.
            seconds: For all of it.
            more: What httpx takes: `json`, `params`.

        Raises:
            AtroposClientError: No whole reply came, or one that is too large.
        """
        if seconds == 0.0:
            raise ReplyTimeout("the phase's time is spent")
        timeout = httpx.Timeout(seconds, connect=min(CONNECT_TIMEOUT, seconds))
        reader = BodyReader(limit=MAX_REPLY_BYTES, patience=seconds)
        with (
            translated_errors(),
            self._client.stream(method, path, timeout=timeout, **more) as response,
        ):
            reader.begin(response.headers)
            for chunk in response.iter_raw():
                reader.feed(chunk)
            content = reader.finish(whole=True)
            return httpx.Response(response.status_code, content=content, request=response.request)

    def _said(self, content: bytes) -> str:
        """Return what a server said, for a message, without the secrets that we sent it."""
        # Redacted before anybody cuts it: half of a token is a leak too.
        text = content[:_LONGEST_SAID].decode("utf-8", "replace")
        for secret in self._secrets:
            text = text.replace(secret, "***") if secret else text
        return text


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

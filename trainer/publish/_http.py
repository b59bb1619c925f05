"""One request to one inference server, inside one deadline; httpx's errors become ours here and only here."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import httpx
from pydantic import BaseModel, SecretStr, ValidationError

from atropos_client import BodyReader, InvalidReply, ReplyTimeout
from trainer.publish._retry import Fault, Repeatability, may_retry, wait_before
from trainer.publish.errors import PHASE_ERRORS, Phase, PhaseDeadlineExceeded

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 5.0
"""Seconds. A server that is up accepts at once; a host that is off answers nothing at all."""

REMIND_SECONDS = 15.0
"""Between two log lines that say that a server is still waited for at the start."""

MAX_REPLY_BYTES = 64 << 20
"""Replies are small; anything larger is not the server we think it is."""

_LONGEST_SAID = 4096  # bytes of a reply that are looked at for a message

Reply = TypeVar("Reply", bound=BaseModel)


@dataclass(frozen=True)
class Deadline:
    """A moment by which a phase has to be over."""

    seconds: float
    """The whole allowance."""
    ends_at: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends_at", time.monotonic() + self.seconds)

    @property
    def left(self) -> float:
        """Seconds left; never negative."""
        return max(0.0, self.ends_at - time.monotonic())


@dataclass(frozen=True)
class _Attempt:
    """How one sending of a request ended; `fault` is None if well."""

    fault: Fault | int | None
    reason: str
    status: int | None = None
    content: bytes = b""
    cause: httpx.HTTPError | None = None


class ServerConnection:
    """Speaks HTTP to one server. Safe to use from one thread at a time."""

    def __init__(
        self, url: str, *, token: SecretStr | None = None, headers: Mapping[str, SecretStr] | None = None
    ) -> None:
        """Prepare; nothing is sent yet. `headers` are secrets, like the token."""
        address = httpx.URL(url)
        self.url = str(address.copy_with(username=None, password=None)).rstrip("/")
        """The base URL without credentials, as every message shows it."""
        self._client = httpx.Client(**client_options(address, token=token, headers=headers))
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

    def call(
        self,
        method: Literal["GET", "POST"],
        path: str,
        *,
        phase: Phase,
        version: int | None,
        deadline: Deadline,
        repeatability: Repeatability,
        body: Any = None,
        query: dict[str, str] | None = None,
    ) -> bytes:
        """Send a request, again where that is safe, and return the body of a reply that means success.

        Raises:
            PhaseDeadlineExceeded: The deadline passed first.
            ServerFailure: The phase's own error: no connection, an error status, or a 200 whose body
                says that it failed.
        """
        attempt = 0
        remind_at = time.monotonic()
        while True:
            attempt += 1
            outcome = self._attempt(method, path, body, query, deadline)
            if outcome.fault is None:
                return outcome.content
            again = may_retry(outcome.fault, repeatability, attempt)
            wait = wait_before(attempt)
            if again and wait < deadline.left:
                logger.debug("%s: %s %s: attempt %d: %s", self.url, method, path, attempt, outcome.reason)
                if repeatability is Repeatability.STARTUP and time.monotonic() >= remind_at:
                    remind_at = time.monotonic() + REMIND_SECONDS
                    waits = (self.url, deadline.left, outcome.reason)
                    logger.info("waiting for the inference server %s, for %.0f s more: %s", *waits)
                time.sleep(wait)
                continue
            # A server that is still starting when the time is up has missed the deadline as well.
            late = outcome.fault is Fault.TIMED_OUT or (again and repeatability is Repeatability.STARTUP)
            kind = PhaseDeadlineExceeded if late else PHASE_ERRORS[phase]
            limit = f"not within {deadline.seconds:g} s: " if late else ""
            raise kind(
                f"{method} {path}: {limit}{outcome.reason}",
                server=self.url,
                phase=phase,
                version=version,
                status=outcome.status,
                server_text=self._said(outcome.content),
            ) from outcome.cause

    def _attempt(
        self, method: str, path: str, body: Any, query: dict[str, str] | None, deadline: Deadline
    ) -> _Attempt:
        try:
            status, content = self._send(method, path, body, query, deadline)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            return _Attempt(Fault.NOT_CONNECTED, f"no connection ({error})", cause=error)
        except httpx.TimeoutException as error:
            return _Attempt(Fault.TIMED_OUT, "no complete reply", cause=error)
        except httpx.HTTPError as error:
            return _Attempt(Fault.CONNECTION_LOST, f"{type(error).__name__}: {error}", cause=error)
        if status != httpx.codes.OK:
            return _Attempt(status, f"HTTP {status}", status=status, content=content)
        if says_failed(content):
            reason = "HTTP 200, but the reply says that it failed"
            return _Attempt(Fault.REFUSED, reason, status=status, content=content)
        return _Attempt(None, "", status=status, content=content)

    def parse(self, content: bytes, kind: type[Reply], *, phase: Phase, version: int | None) -> Reply:
        """Validate a reply's body.

        Raises:
            ServerFailure: The phase's own error, if the body is not of the expected shape.
        """
        try:
            return kind.model_validate_json(content)
        except ValidationError as error:
            details = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(part) for part in details["loc"]) or "the body"
            raise PHASE_ERRORS[phase](
                f"the reply is not a {kind.__name__}: {place}: {details['msg']}",
                server=self.url,
                phase=phase,
                version=version,
                server_text=self._said(content),
            ) from error

    def _said(self, content: bytes) -> str:
        """What a server said, for a message: a server, or a proxy before it, may repeat what we sent it."""
        # Redacted before anybody cuts it: half of a token is a leak too.
        text = content[:_LONGEST_SAID].decode("utf-8", "replace")
        for secret in self._secrets:
            text = text.replace(secret, "***") if secret else text
        return text

    def _send(
        self, method: str, path: str, body: Any, query: dict[str, str] | None, deadline: Deadline
    ) -> tuple[int, bytes]:
        left = deadline.left
        if left == 0.0:
            raise httpx.ReadTimeout("the phase's time is spent")
        timeout = httpx.Timeout(left, connect=min(CONNECT_TIMEOUT, left))
        with self._client.stream(method, path, json=body, params=query, timeout=timeout) as response:
            return response.status_code, read_whole(response, seconds=left)


def read_whole(response: httpx.Response, *, seconds: float) -> bytes:
    """Read a reply's body, within bounds of size and time.

    Raises:
        httpx.ReadTimeout: It does not end in time; httpx bounds the wait for each chunk, not their sum.
        httpx.RemoteProtocolError: It is too large, or compressed in a way that was not asked for.
    """
    reader = BodyReader(limit=MAX_REPLY_BYTES, patience=seconds)
    try:
        reader.begin(response.headers)
        for chunk in response.iter_raw():
            reader.feed(chunk)
        return reader.finish(whole=True)
    except ReplyTimeout as error:
        raise httpx.ReadTimeout("the reply did not end in time") from error
    except InvalidReply as error:
        raise httpx.RemoteProtocolError(str(error)) from error


def client_options(
    address: httpx.URL | str,
    *,
    token: SecretStr | None = None,
    headers: Mapping[str, SecretStr] | None = None,
) -> dict[str, Any]:
    """Keyword arguments of an `httpx.Client` that speaks to an inference server."""
    # Only what can be bounded while it is decompressed.
    sent = {"Accept-Encoding": "gzip"}
    sent.update({name: value.get_secret_value() for name, value in (headers or {}).items()})
    if token is not None:
        sent["Authorization"] = f"Bearer {token.get_secret_value()}"
    return {
        "base_url": address,
        "headers": sent,
        # A redirect could carry the token to another host.
        "follow_redirects": False,
        # Neither ~/.netrc nor a proxy variable of the shell decides where the token goes.
        "trust_env": False,
        # uvicorn, which serves vLLM and SGLang, closes a connection after 5 idle seconds and after an error
        # of a route. What is sent meanwhile gets no answer, and a step of a transfer is sent only once.
        "limits": httpx.Limits(max_keepalive_connections=0),
    }


def says_failed(content: bytes) -> bool:
    """Whether the body of a 200 reply says that the request failed after all."""
    parsed: Any = None
    with contextlib.suppress(ValueError, RecursionError):  # nested too deeply to say anything
        parsed = json.loads(content)
    if not isinstance(parsed, dict):
        return False
    return parsed.get("success") is False or bool(parsed.get("error")) or parsed.get("object") == "error"

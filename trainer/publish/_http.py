"""One request to one inference server, inside one deadline; httpx's errors become ours here and only here."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import httpx
from pydantic import BaseModel, SecretStr, ValidationError

from trainer.publish._retry import Fault, Repeatability, may_retry, wait_before
from trainer.publish.errors import PHASE_ERRORS, Phase, PhaseDeadlineExceeded

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 5.0
"""Seconds. A server that is up accepts at once; a host that is off answers nothing at all."""

REMIND_SECONDS = 15.0
"""Between two log lines that say that a server is still waited for at the start."""

MAX_REPLY_BYTES = 64 << 20
"""Replies are small; anything larger is not the server we think it is."""

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

    def __init__(self, url: str, *, token: SecretStr | None = None) -> None:
        address = httpx.URL(url)
        self.url = str(address.copy_with(username=None, password=None)).rstrip("/")
        """The base URL without credentials, as every message shows it."""
        headers = {"Authorization": f"Bearer {token.get_secret_value()}"} if token is not None else {}
        self._client = httpx.Client(base_url=address, headers=headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections that are kept open for reuse."""
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
                server_text=outcome.content.decode("utf-8", "replace"),
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
                server_text=content.decode("utf-8", "replace"),
            ) from error

    def _send(
        self, method: str, path: str, body: Any, query: dict[str, str] | None, deadline: Deadline
    ) -> tuple[int, bytes]:
        left = deadline.left
        if left == 0.0:
            raise httpx.ReadTimeout("the phase's time is spent")
        timeout = httpx.Timeout(left, connect=min(CONNECT_TIMEOUT, left))
        with self._client.stream(method, path, json=body, params=query, timeout=timeout) as response:
            content = bytearray()
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MAX_REPLY_BYTES:
                    raise httpx.RemoteProtocolError(f"the reply is larger than {MAX_REPLY_BYTES} bytes")
                # httpx bounds the wait for each chunk, not their sum: a trickle has to end here.
                if deadline.left == 0.0:
                    raise httpx.ReadTimeout("the reply did not end in time")
            return response.status_code, bytes(content)


def says_failed(content: bytes) -> bool:
    """Whether the body of a 200 reply says that the request failed after all."""
    parsed: Any = None
    with contextlib.suppress(ValueError):
        parsed = json.loads(content)
    if not isinstance(parsed, dict):
        return False
    return parsed.get("success") is False or bool(parsed.get("error")) or parsed.get("object") == "error"

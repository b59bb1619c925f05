"""Speaks to one Atropos API server."""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager, closing
from typing import Final, TypeVar

import httpx
from pydantic import BaseModel

from atropos_client._body import BodyReader
from atropos_client._reading import read_as
from atropos_client._reply import Reply, judge, may_have_removed, possibly_lost
from atropos_client._retry import NO_RETRIES, RetryPolicy, send_within
from atropos_client._settings import ConnectionSettings
from atropos_client._translate import translated_errors
from atropos_client.clock import running_time
from atropos_client.errors import ApiUnreachable, AtroposClientError, InvalidReply, RequestFailed, ServerError
from schemas import (
    EnvironmentIdentifier,
    EnvironmentStatus,
    InfoReply,
    Registration,
    ScoredGroup,
    StatusReply,
)

M = TypeVar("M", bound=BaseModel)

logger = logging.getLogger(__name__)

_READY_PAUSE: Final = 0.2  # seconds between two looks at a server that is starting
_REMIND_SECONDS: Final = 15.0  # between two log lines that say that we still wait for it


class AtroposClient(AbstractContextManager["AtroposClient"]):
    """Speaks to one Atropos API server. Threads may share it; each request has a connection of its own.

    Example::

        with AtroposClient("http://127.0.0.1:8000") as client:
            client.register(Registration(batch_size=64, max_token_len=2048, num_steps=100))
            reply = parse_batch(client.fetch_batch())   # its state: "ready", "waiting" or "unregistered"

    Every method raises an :class:`~atropos_client.AtroposClientError` and nothing else for what can go wrong
    outside this process.
    """

    def __init__(self, api: str | ConnectionSettings) -> None:
        """Prepare a client; nothing is sent yet.

        Args:
            api: Its address, for example ``http://127.0.0.1:8000``, or all of how to reach it.

        Raises:
            ValueError: If the address makes no sense.
        """
        self._settings = ConnectionSettings(url=api) if isinstance(api, str) else api
        self._http = httpx.Client(**self._settings.http_options())
        if self._settings.tells_secrets:
            logger.warning(
                "Credentials for the Atropos API travel unencrypted to %s: use https.", self.base_url
            )

    @property
    def base_url(self) -> str:
        """Address of the API, without credentials."""
        return self._settings.url

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r})"

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. The client cannot be used afterwards."""
        self._http.close()

    def register(self, registration: Registration) -> None:
        """Register the trainer. Only the first registration since the API started counts."""
        self._call("POST", "/register", _json(registration))  # what a second one says is ignored

    def fetch_batch(self) -> bytes:
        """Take the next batch, if there is one, as JSON that nobody has read yet, to be stored first.

        Raises:
            BatchPossiblyLost: If the request failed after the server may have removed a batch.
        """
        return self._call("GET", "/batch", removes_batch=True)

    def status(self) -> StatusReply:
        """Return how many groups wait and how many batches were formed."""
        return self._ask(StatusReply, "GET", "/status")

    def info(self) -> InfoReply:
        """Return the batch size and the longest sequence of the registration in force."""
        return self._ask(InfoReply, "GET", "/info")

    def latest_example(self) -> ScoredGroup | None:
        """Return the last group that reached the queue, without removing it. None: there was none."""
        body = self._call("GET", "/latest_example")
        if body.startswith(b'{"tokens":[],'):  # what the server answers: every field an empty list
            return None
        return self._read(ScoredGroup, body, "GET", "/latest_example")

    def wait_until_ready(self, deadline: float) -> None:
        """Wait until the API answers.

        Args:
            deadline: Seconds from now.

        Raises:
            ApiUnreachable: If nothing answered in time; the cause says what came last.
            ErrorStatus: If the answer is one that waiting does not change, such as a refused token.
        """
        started = running_time()
        end, remind_at = started + deadline, started
        while True:
            try:
                self._call("GET", "/", retries=NO_RETRIES)
            except (RequestFailed, ServerError) as error:
                now = running_time()
                if now >= remind_at:
                    remind_at = now + _REMIND_SECONDS
                    logger.info(
                        "waiting for the Atropos API at %s, for %.0f s of %g s: %s",
                        self.base_url,
                        now - started,
                        deadline,
                        error,
                    )
                if now + _READY_PAUSE > end:
                    raise ApiUnreachable(
                        f"the Atropos API at {self.base_url} was not ready within {deadline:g} s: {error}"
                    ) from error
            else:
                return
            time.sleep(_READY_PAUSE)

    def environment_status(self, env_id: int) -> EnvironmentStatus:
        """Return what an environment needs to decide whether to produce more."""
        body = _json(EnvironmentIdentifier(env_id=env_id))
        return self._ask(EnvironmentStatus, "GET", "/status-env", body)

    def reset_data(self) -> None:
        """Wipe the queue and the registration. Until the next registration ``GET /batch`` fails with 500."""
        self._call("GET", "/reset_data", expects_json=False)

    def _ask(self, reply: type[M], method: str, path: str, body: bytes | None = None) -> M:
        return self._read(reply, self._call(method, path, body), method, path)

    def _read(self, reply: type[M], body: bytes, method: str, path: str) -> M:
        try:
            return read_as(reply, body)
        except InvalidReply as error:
            error.method, error.url = method, self.base_url + path
            raise

    def _call(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        expects_json: bool = True,
        removes_batch: bool = False,
        retries: RetryPolicy | None = None,
    ) -> bytes:
        """Send a request, repeating it where that is safe, and return the body of the reply.

        Args:
            method: Of HTTP.
            path: Below the base URL.
            body: JSON.
            expects_json: Whether a reply that is not labelled as JSON is refused.
            removes_batch: Whether the server forgets what it answers; such a request is not repeated.
            retries: Bounds on repeating it. None: those of the settings.

        Raises:
            BatchPossiblyLost: If it removes a batch and failed after it may have been sent.
            AtroposClientError: Whatever the last sending failed of.
        """

        def send() -> bytes:
            reply = self._send(method, path, body, removes_batch=removes_batch)
            return judge(reply, self._settings, expects_json=expects_json)

        try:
            return send_within(retries or self._settings.retries, send, once=removes_batch)
        except AtroposClientError as error:
            error.method, error.url = method, self.base_url + path
            if removes_batch and may_have_removed(error):
                raise possibly_lost(error) from error
            raise

    def _send(self, method: str, path: str, body: bytes | None, *, removes_batch: bool) -> Reply:
        headers = {} if body is None else {"Content-Type": "application/json"}
        timeout = self._settings.phase_timeouts(batch=removes_batch)
        reader = BodyReader(limit=self._settings.max_body_bytes, patience=self._settings.timeouts.total)
        request = self._http.build_request(method, path, content=body, headers=headers, timeout=timeout)
        with translated_errors(), closing(self._http.send(request, stream=True)) as response:
            # The first piece of a failing server's page is enough for the message.
            content = reader.read(response, whole=response.status_code < 500)
            return Reply(response.status_code, response.headers, content)


def _json(request: BaseModel) -> bytes:
    return request.model_dump_json().encode()

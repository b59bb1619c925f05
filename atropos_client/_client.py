"""Speaks to one Atropos API server."""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import httpx
from pydantic import SecretStr

from atropos_client import _calls
from atropos_client._body import BodyReader
from atropos_client._calls import Call
from atropos_client._exchange import Reply, encode_request, exchange, worth_keeping
from atropos_client._retry import NO_RETRIES, RetryPolicy
from atropos_client._settings import DEFAULT_MAX_BODY_BYTES, Timeouts, connection_settings
from atropos_client._translate import translated_errors
from atropos_client.clock import running_time
from atropos_client.errors import ApiUnreachable, RequestFailed, ServerError
from schemas import (
    BatchReply,
    DisconnectReply,
    EnvironmentRegistration,
    EnvironmentRegistrationReply,
    EnvironmentStatus,
    InfoReply,
    Registration,
    RegistrationReply,
    ScoredDataListReply,
    ScoredDataReply,
    ScoredGroup,
    StatusReply,
    WandbInfoReply,
)

T = TypeVar("T")

logger = logging.getLogger(__name__)

_READY_PAUSE: Final = 0.2  # seconds between two looks at a server that is starting
_REMIND_SECONDS: Final = 15.0  # between two log lines that say that we still wait for it


class AtroposClient:
    """Speaks to one Atropos API server. Threads may share it; connections are reused.

    Example::

        with AtroposClient("http://127.0.0.1:8000") as client:
            client.register(Registration(batch_size=64, max_token_len=2048, num_steps=100))
            reply = client.fetch_batch()   # reply.state: "ready", "waiting" or "unregistered"

    Every method raises an :class:`~atropos_client.AtroposClientError` and nothing else for what can go wrong
    outside this process.
    """

    def __init__(
        self,
        base_url: str,
        *,
        token: SecretStr | str | None = None,
        headers: Mapping[str, SecretStr | str] | None = None,
        verify: bool | str | Path | ssl.SSLContext = True,
        timeouts: Timeouts | None = None,
        retries: RetryPolicy | None = None,
        max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Prepare a client; nothing is sent yet.

        Args:
            base_url: For example ``http://127.0.0.1:8000``, possibly with a path prefix.
            token: Bearer token, for a proxy that asks for one.
            headers: Further headers of every request; treated as secrets.
            verify: How the server's certificate is checked: True (the usual authorities), a file or directory
                of authorities, an ``ssl.SSLContext`` (client certificates), or False (not at all).
            timeouts: Patience per phase. None: the defaults of `Timeouts`.
            retries: Bounds on repeating a request. None: the defaults of `RetryPolicy`.
            max_body_bytes: Largest reply, in bytes, before and after decompression.
            transport: How bytes travel, for tests and unusual networks. None: ordinary HTTP.

        Raises:
            ValueError: If the address or a bound makes no sense.
        """
        self._settings = connection_settings(
            base_url,
            token=token,
            headers=headers,
            verify=verify,
            timeouts=timeouts,
            max_body_bytes=max_body_bytes,
        )
        self._retries = retries or RetryPolicy()
        self._http = httpx.Client(transport=transport, **self._settings.http_options())

    @property
    def base_url(self) -> str:
        """Address of the API, without credentials."""
        return self._settings.base_url

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. The client cannot be used afterwards."""
        self._http.close()

    # The trainer's side.

    def register(self, registration: Registration) -> RegistrationReply:
        """Register the trainer. Only the first registration since the API started counts."""
        return self._call(_calls.register(registration))

    def fetch_batch(self) -> BatchReply:
        """Take the next batch, if there is one.

        Raises:
            BatchPossiblyLost: If the request failed after the server may have removed a batch.
        """
        return self._call(_calls.fetch_batch())

    def fetch_batch_body(self) -> bytes:
        """Take the next batch as bytes (JSON, decompressed) without parsing it, to be stored first.

        Raises:
            BatchPossiblyLost: If the request failed after the server may have removed a batch.
        """
        return self._call(_calls.fetch_batch_body())

    def status(self) -> StatusReply:
        """Return how many groups wait and how many batches were formed."""
        return self._call(_calls.status())

    def info(self) -> InfoReply:
        """Return the batch size and the longest sequence of the registration in force."""
        return self._call(_calls.info())

    def wandb_info(self) -> WandbInfoReply:
        """Return the Weights & Biases names of the registration in force."""
        return self._call(_calls.wandb_info())

    def latest_example(self) -> ScoredGroup | None:
        """Return the last group that reached the queue, without removing it. None: there was none."""
        return self._call(_calls.latest_example())

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
                self._call(_calls.greeting(), NO_RETRIES)
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

    # The environments' side.

    def register_environment(self, registration: EnvironmentRegistration) -> EnvironmentRegistrationReply:
        """Register an environment; not `accepted` before the trainer has polled once."""
        return self._call(_calls.register_environment(registration))

    def environment_status(self, env_id: int) -> EnvironmentStatus:
        """Return what an environment needs to decide whether to produce more."""
        return self._call(_calls.environment_status(env_id))

    def push_group(self, group: ScoredGroup) -> ScoredDataReply:
        """Hand one group to the queue."""
        return self._call(_calls.push_group(group))

    def push_groups(self, groups: Sequence[ScoredGroup]) -> ScoredDataListReply:
        """Hand several groups to the queue at once."""
        return self._call(_calls.push_groups(groups))

    def disconnect_environment(self, env_id: int) -> DisconnectReply:
        """Say that an environment will send no more."""
        return self._call(_calls.disconnect_environment(env_id))

    def reset_data(self) -> None:
        """Wipe the queue and the registration. Until the next registration ``GET /batch`` fails with 500."""
        self._call(_calls.reset_data())

    def _call(self, call: Call[T], retries: RetryPolicy | None = None) -> T:
        return exchange(call, self._send, retries or self._retries, self._settings)

    def _send(self, call: Call[Any]) -> Reply:
        headers, body = encode_request(call)
        timeout = self._settings.phase_timeouts(batch=call.removes_batch)
        reader = BodyReader(limit=self._settings.max_body_bytes, patience=self._settings.timeouts.total)
        request = self._http.build_request(
            call.method, call.path, content=body, headers=headers, timeout=timeout
        )
        with translated_errors(), closing(self._http.send(request, stream=True)) as response:
            reader.begin(response.headers)
            for chunk in response.iter_raw():
                reader.feed(chunk)
                if not worth_keeping(response):
                    break
            content = reader.finish(whole=worth_keeping(response))
            return Reply(response.status_code, response.headers, content)

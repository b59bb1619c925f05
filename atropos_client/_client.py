"""Speaks to one Atropos API server."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import httpx
from pydantic import SecretStr, TypeAdapter

from atropos_client._body import BodyReader
from atropos_client._calls import Call, get, post, reader
from atropos_client._exchange import Reply, encode_request, exchange, worth_keeping
from atropos_client._retry import NO_RETRIES, Resend, RetryPolicy
from atropos_client._settings import DEFAULT_MAX_BODY_BYTES, ConnectionSettings, Timeouts
from atropos_client._translate import translated_errors
from atropos_client.clock import running_time
from atropos_client.errors import ApiUnreachable, RequestFailed, ServerError
from schemas import (
    EnvironmentIdentifier,
    EnvironmentRegistration,
    EnvironmentRegistrationReply,
    EnvironmentStatus,
    InfoReply,
    Registration,
    RegistrationReply,
    ScoredDataListReply,
    ScoredGroup,
    StatusReply,
)

T = TypeVar("T")

logger = logging.getLogger(__name__)

_GROUPS: TypeAdapter[list[ScoredGroup]] = TypeAdapter(list[ScoredGroup])
_GREETING: Final = Call[None](method="GET", path="/", parse=lambda _: None, resend=Resend.HARMLESS)
_READY_PAUSE: Final = 0.2  # seconds between two looks at a server that is starting
_REMIND_SECONDS: Final = 15.0  # between two log lines that say that we still wait for it


class AtroposClient:
    """Speaks to one Atropos API server. Threads may share it; connections are reused.

    Example::

        with AtroposClient("http://127.0.0.1:8000") as client:
            client.register(Registration(batch_size=64, max_token_len=2048, num_steps=100))
            reply = parse_batch(client.fetch_batch())   # its state: "ready", "waiting" or "unregistered"

    Every method raises an :class:`~atropos_client.AtroposClientError` and nothing else for what can go wrong
    outside this process.
    """

    def __init__(
        self,
        base_url: str,
        *,
        token: SecretStr | None = None,
        headers: Mapping[str, SecretStr] | None = None,
        ca_file: Path | None = None,
        timeouts: Timeouts | None = None,
        retries: RetryPolicy | None = None,
        max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    ) -> None:
        """Prepare a client; nothing is sent yet.

        Args:
            base_url: For example ``http://127.0.0.1:8000``, possibly with a path prefix.
            token: See `ConnectionSettings`, as for the others.
            headers: Further headers of every request.
            ca_file: Authorities that vouch for the server's certificate.
            timeouts: Patience per phase of a request.
            retries: Bounds on repeating a request. None: the defaults of `RetryPolicy`.
            max_body_bytes: Largest reply.

        Raises:
            ValueError: If the address, a secret or the bound makes no sense.
        """
        self._settings = ConnectionSettings(
            base_url=base_url,
            token=token,
            headers=headers or {},
            ca_file=ca_file,
            timeouts=timeouts or Timeouts(),
            max_body_bytes=max_body_bytes,
        )
        self._retries = retries or RetryPolicy()
        self._http = httpx.Client(**self._settings.http_options())

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
        # Harmless to repeat: the server ignores what a second one says.
        return self._call(post("/register", registration, RegistrationReply, Resend.HARMLESS))

    def fetch_batch(self) -> bytes:
        """Take the next batch, if there is one, as JSON that nobody has read yet, to be stored first.

        Raises:
            BatchPossiblyLost: If the request failed after the server may have removed a batch.
        """
        resend = Resend.ONLY_IF_NOT_SENT
        return self._call(Call(method="GET", path="/batch", parse=bytes, resend=resend, removes_batch=True))

    def status(self) -> StatusReply:
        """Return how many groups wait and how many batches were formed."""
        return self._call(get("/status", StatusReply))

    def info(self) -> InfoReply:
        """Return the batch size and the longest sequence of the registration in force."""
        return self._call(get("/info", InfoReply))

    def latest_example(self) -> ScoredGroup | None:
        """Return the last group that reached the queue, without removing it. None: there was none."""

        def parse(body: bytes) -> ScoredGroup | None:
            # What the server answers when it has none: every field an empty list.
            return None if body.startswith(b'{"tokens":[],') else reader(ScoredGroup)(body)

        return self._call(Call(method="GET", path="/latest_example", parse=parse, resend=Resend.HARMLESS))

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
                self._call(_GREETING, NO_RETRIES)
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
        # A second one would add a second environment.
        resend = Resend.ONLY_IF_NOT_SENT
        return self._call(post("/register-env", registration, EnvironmentRegistrationReply, resend))

    def environment_status(self, env_id: int) -> EnvironmentStatus:
        """Return what an environment needs to decide whether to produce more."""
        return self._call(get("/status-env", EnvironmentStatus, EnvironmentIdentifier(env_id=env_id)))

    def push_groups(self, groups: Sequence[ScoredGroup]) -> ScoredDataListReply:
        """Hand groups to the queue."""
        return self._call(
            Call(
                method="POST",
                path="/scored_data_list",
                body=_GROUPS.dump_json(list(groups), exclude_none=True),
                parse=reader(ScoredDataListReply),
                resend=Resend.ONLY_IF_NOT_SENT,  # a second one would store the groups twice
            )
        )

    def reset_data(self) -> None:
        """Wipe the queue and the registration. Until the next registration ``GET /batch`` fails with 500."""
        harmless = Resend.HARMLESS
        self._call(
            Call(method="GET", path="/reset_data", parse=lambda _: None, resend=harmless, expects_json=False)
        )

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
            content = reader.read(response, whole=worth_keeping(response))
            return Reply(response.status_code, response.headers, content)

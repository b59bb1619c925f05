"""The asynchronous client of the Atropos API: the same flows as the synchronous one, another driver."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import SecretStr

from atropos_client import _calls
from atropos_client._body import BodyReader
from atropos_client._calls import Call
from atropos_client._exchange import (
    Flow,
    Pause,
    Reply,
    encode_request,
    exchange,
    wait_until_ready,
    worth_keeping,
)
from atropos_client._retry import RetryPolicy
from atropos_client._settings import DEFAULT_MAX_BODY_BYTES, Timeouts, connection_settings
from atropos_client._translate import translated_errors
from atropos_client.errors import AtroposClientError
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


class AsyncAtroposClient:
    """Speaks to one Atropos API server from asyncio code. Tasks of one event loop may share it.

    Example::

        async with AsyncAtroposClient("http://127.0.0.1:8000") as client:
            reply = await client.fetch_batch()

    Methods, errors and guarantees are those of :class:`~atropos_client.AtroposClient`.
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
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """As :class:`~atropos_client.AtroposClient`, with an asynchronous transport."""
        self._settings = connection_settings(
            base_url,
            token=token,
            headers=headers,
            verify=verify,
            timeouts=timeouts,
            max_body_bytes=max_body_bytes,
        )
        self._retries = retries or RetryPolicy()
        self._http = httpx.AsyncClient(transport=transport, **self._settings.http_options())

    @property
    def base_url(self) -> str:
        """Address of the API, without credentials."""
        return self._settings.base_url

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections. The client cannot be used afterwards."""
        await self._http.aclose()

    # The trainer's side.

    async def register(self, registration: Registration) -> RegistrationReply:
        """Register the trainer. Only the first registration since the API started counts."""
        return await self._call(_calls.register(registration))

    async def fetch_batch(self) -> BatchReply:
        """Take the next batch, if there is one."""
        return await self._call(_calls.fetch_batch())

    async def fetch_batch_body(self) -> bytes:
        """Take the next batch as bytes (JSON, decompressed) without parsing it, to be stored first."""
        return await self._call(_calls.fetch_batch_body())

    async def status(self) -> StatusReply:
        """Return how many groups wait and how many batches were formed."""
        return await self._call(_calls.status())

    async def info(self) -> InfoReply:
        """Return the batch size and the longest sequence of the registration in force."""
        return await self._call(_calls.info())

    async def wandb_info(self) -> WandbInfoReply:
        """Return the Weights & Biases names of the registration in force."""
        return await self._call(_calls.wandb_info())

    async def latest_example(self) -> ScoredGroup | None:
        """Return the last group that reached the queue, without removing it. None: there was none."""
        return await self._call(_calls.latest_example())

    async def wait_until_ready(self, deadline: float) -> None:
        """Wait until the API answers."""
        await self._drive(wait_until_ready(deadline, self._settings))

    # The environments' side.

    async def register_environment(
        self, registration: EnvironmentRegistration
    ) -> EnvironmentRegistrationReply:
        """Register an environment; not `accepted` before the trainer has polled once."""
        return await self._call(_calls.register_environment(registration))

    async def environment_status(self, env_id: int) -> EnvironmentStatus:
        """Return what an environment needs to decide whether to produce more."""
        return await self._call(_calls.environment_status(env_id))

    async def push_group(self, group: ScoredGroup) -> ScoredDataReply:
        """Hand one group to the queue."""
        return await self._call(_calls.push_group(group))

    async def push_groups(self, groups: Sequence[ScoredGroup]) -> ScoredDataListReply:
        """Hand several groups to the queue at once."""
        return await self._call(_calls.push_groups(groups))

    async def disconnect_environment(self, env_id: int) -> DisconnectReply:
        """Say that an environment will send no more."""
        return await self._call(_calls.disconnect_environment(env_id))

    async def reset_data(self) -> None:
        """Wipe the queue and the registration. Until the next registration ``GET /batch`` fails with 500."""
        await self._call(_calls.reset_data())

    # Driving: the only code that differs between the two clients.

    async def _call(self, call: Call[T]) -> T:
        return await self._drive(exchange(call, self._retries, self._settings))

    async def _drive(self, flow: Flow[T]) -> T:
        try:
            step = next(flow)
            while True:
                if isinstance(step, Pause):
                    await asyncio.sleep(step.seconds)
                    step = flow.send(None)
                    continue
                try:
                    reply = await self._send(step.call)
                except AtroposClientError as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(reply)
        except StopIteration as done:
            result: T = done.value
            return result

    async def _send(self, call: Call[Any]) -> Reply:
        headers, body = encode_request(call)
        timeout = self._settings.phase_timeouts(batch=call.removes_batch)
        reader = BodyReader(limit=self._settings.max_body_bytes, patience=self._settings.timeouts.total)
        request = self._http.build_request(
            call.method, call.path, content=body, headers=headers, timeout=timeout
        )
        with translated_errors():
            response = await self._http.send(request, stream=True)
            async with aclosing(response):
                reader.begin(response.headers)
                async for chunk in response.aiter_raw():
                    reader.feed(chunk)
                    if not worth_keeping(response):
                        break
                content = reader.finish(whole=worth_keeping(response))
                return Reply(response.status_code, response.headers, content)

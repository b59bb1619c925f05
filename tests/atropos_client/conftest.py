"""Fixtures for the client: a server that misbehaves on demand, and both clients behind one call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from atropos_client import AsyncAtroposClient, AtroposClient, RetryPolicy
from tests.atropos_client.misbehaving_server import MisbehavingServer

QUICK = RetryPolicy(attempts=3, wall_clock=20.0, first_pause=0.01, longest_pause=0.02)

Ask = Callable[..., Any]


@pytest.fixture
def server() -> Iterator[MisbehavingServer]:
    with MisbehavingServer() as running:
        yield running


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Call ``ask(url, "method", *arguments, **client_options)`` on a fresh client of either kind."""

    def ask_sync(url: str, method: str, *arguments: Any, **options: Any) -> Any:
        with AtroposClient(url, **{"retries": QUICK, **options}) as client:
            return getattr(client, method)(*arguments)

    def ask_async(url: str, method: str, *arguments: Any, **options: Any) -> Any:
        async def run() -> Any:
            async with AsyncAtroposClient(url, **{"retries": QUICK, **options}) as client:
                return await getattr(client, method)(*arguments)

        return asyncio.run(run())

    return ask_sync if request.param == "sync" else ask_async

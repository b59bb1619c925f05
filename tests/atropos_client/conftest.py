"""Fixtures for the client: a server that misbehaves on demand, and one call of a fresh client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from atropos_client import AtroposClient, ConnectionSettings, RetryPolicy
from atropos_client.journal import Journal
from tests.atropos_client.misbehaving_server import Answer, MisbehavingServer

QUICK = RetryPolicy(attempts=3, wall_clock=20.0, first_pause=0.01, longest_pause=0.02)

Ask = Callable[..., Any]


@pytest.fixture
def server() -> Iterator[MisbehavingServer]:
    with MisbehavingServer() as running:
        yield running


@pytest.fixture
def registered(server: MisbehavingServer) -> None:
    """Let the server take a registration, and tell it."""
    server.script("/register", Answer(body=b'{"uuid":1}'))
    server.script("/info", Answer(body=b'{"batch_size":2,"max_token_len":128}'))
    server.script("/status", Answer(body=b'{"current_step":0,"queue_size":0}'))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Of a journal that is not there yet, nor is the directory above it."""
    return tmp_path / "output" / "journal"


@pytest.fixture
def journal(directory: Path) -> Iterator[Journal]:
    with Journal.open(directory) as opened:
        yield opened


@pytest.fixture
def ask() -> Ask:
    """Call ``ask(url, "method", *arguments, **client_options)`` on a fresh client."""

    def ask(url: str, method: str, *arguments: Any, **options: Any) -> Any:
        with AtroposClient(ConnectionSettings(url=url, **{"retries": QUICK, **options})) as client:
            return getattr(client, method)(*arguments)

    return ask

"""The three places that speak HTTP, as one function each: they must all keep the same rules."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from pydantic import SecretStr

from atropos_client import NO_RETRIES, AtroposClient, AtroposClientError, ConnectionSettings
from trainer.check._inference import check_inference_server
from trainer.config import TrainerConfig, load_config
from trainer.publish.engines.connection import Deadline, ServerConnection
from trainer.publish.errors import Phase, ServerFailure

SECRET = "tell-no-one-ABC123"  # noqa: S105 - of no service
PATIENCE = 30.0

Party = Callable[[str], str]
"""Sends a request with SECRET to a base URL and returns what it has to say about the reply."""


def ask_api(url: str) -> str:
    with AtroposClient(ConnectionSettings(url=url, token=SECRET, retries=NO_RETRIES)) as client:
        try:
            return str(client.status())
        except AtroposClientError as error:
            return f"failed: {error}"


def publish_to(url: str) -> str:
    with closing(ServerConnection(url, token=SecretStr(SECRET))) as connection:
        try:
            reply = connection.call("GET /status", Phase.READY, deadline=Deadline(PATIENCE), once=True)
            return reply.decode(errors="replace")
        except ServerFailure as error:
            return f"failed: {error}"


def check(url: str) -> str:
    found = check_inference_server(url, config("--publish.token", SECRET), None)
    return " ".join(f"{result.status}: {result.found}" for result in found)


def config(*words: str) -> TrainerConfig:
    return load_config(None, ["--model.path", "nothing", *words], environment={})


PARTIES = pytest.mark.parametrize("party", [ask_api, publish_to, check])


def paths_below(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*")}

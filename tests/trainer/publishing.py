"""A publisher of a stand-in policy, to stand-in servers, over a directory; the fixtures are in `conftest`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.trainer.inference_stand_in import PROBES, Policy, StandIn
from trainer.config import PublishSettings
from trainer.publish import (
    DiskTransport,
    InferenceServer,
    LogprobPolicy,
    Probes,
    Publisher,
    SglangRoutes,
    VllmRoutes,
)


def settings_for(*servers: StandIn, **options: Any) -> PublishSettings:
    """Over a directory; the first failure ends it, and nobody looks after the servers in between."""
    defaults = {
        "transport": "disk",
        "servers": [server.url for server in servers],
        "on_failure": "abort",
        "watch_interval": 60.0,
    }
    return PublishSettings(**(defaults | options))


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for something; the bound only ends a hang."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@contextmanager
def publishing(
    policy: Policy,
    directory: Path,
    *servers: StandIn,
    probes: Probes = PROBES,
    served_model_name: str | None = None,
    logprobs: LogprobPolicy | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    **options: Any,
) -> Iterator[Publisher]:
    settings = settings_for(*servers, **options)

    def routes(url: str) -> InferenceServer:
        if settings.engine == "sglang":
            return SglangRoutes(url, settings)
        return VllmRoutes(url, settings, served_model_name=served_model_name)

    with Publisher(
        settings,
        transport=DiskTransport(directory, lambda: policy.capture(), keep=settings.keep),
        servers=[routes(url) for url in settings.servers],
        probes=probes,
        score=lambda asked: policy.score(asked),
        logprobs=logprobs,
        stop_requested=stop_requested,
    ) as publisher:
        yield publisher

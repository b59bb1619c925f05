"""What the tests of publishing share: a policy, a server that has its weights, a publisher between them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.inference_stand_in import BASE, Policy, StandIn, serving
from tests.trainer.publishing import publishing
from trainer.publish import Publisher


@pytest.fixture
def stand_in() -> StandIn:
    """Speaks vLLM's routes, with the weights `BASE`; a module may have another."""
    return StandIn(BASE)


@pytest.fixture
def server(stand_in: StandIn) -> Iterator[StandIn]:
    """The stand-in, listening."""
    with serving(stand_in):
        yield stand_in


@pytest.fixture
def policy() -> Policy:
    """Holds the weights `BASE`."""
    return Policy(BASE)


@pytest.fixture
def options() -> dict[str, Any]:
    """What `publisher` is made with, beside what `publishing` says."""
    return {}


@pytest.fixture
def publisher(
    policy: Policy, server: StandIn, tmp_path: Path, options: dict[str, Any]
) -> Iterator[Publisher]:
    """Has found version 0 served; nothing is under way, and the server has forgotten what it was asked."""
    with publishing(policy, tmp_path, server, **options) as publisher:
        publisher.start(0)
        publisher.settle()
        server.calls.clear()
        yield publisher

"""What the tests of publishing share: a policy, and a server that has its weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.trainer.inference_stand_in import BASE, Policy, StandIn, serving


@pytest.fixture
def server() -> Iterator[StandIn]:
    """Speaks vLLM's routes, with the weights `BASE`."""
    stand_in = StandIn(BASE)
    with serving(stand_in):
        yield stand_in


@pytest.fixture
def policy() -> Policy:
    """Holds the weights `BASE`."""
    return Policy(BASE)

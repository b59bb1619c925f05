"""Our side of the contract, from the API's own description of itself.

Groups that the real API's OpenAPI schema allows are generated (schemathesis), sent to the real API as an
environment sends them, fetched by the real client, and prepared. Whatever the API takes and serves must be
trained on, set aside with a reason, or refused with an error of ours. What was once found to break that is a
row of the table.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atropos_client import (
    NO_RETRIES,
    AtroposClient,
    BatchPossiblyLost,
    ConnectionSettings,
    InvalidReply,
    parse_batch,
)
from schemas import Registration
from tests.atropos_client.test_real_api import RealApi
from tests.hostile.case import NEIGHBOUR
from tests.hostile.test_fuzz import pack_everything
from tests.schemas.groups import groups

pytestmark = pytest.mark.slow

EXAMPLES = 60
PATIENCE = 60.0


@pytest.fixture(scope="module")
def api() -> Iterator[RealApi]:
    with RealApi() as running:
        yield running


@pytest.fixture(scope="module")
def pushes(api: RealApi) -> dict[str, st.SearchStrategy[Any]]:
    """Cases of the two routes by which environments send groups."""
    described = schemathesis.openapi.from_dict(httpx.get(f"{api.url}/openapi.json").json())
    return {path: described[path]["POST"].as_strategy() for path in ("/scored_data", "/scored_data_list")}


def sequences_of(body: Any) -> int:
    """How many sequences the API counts in it; a batch is formed of exactly so many."""
    found = body if isinstance(body, list) else [body]
    lengths = [
        len(group["tokens"])
        for group in found
        if isinstance(group, dict) and isinstance(group.get("tokens"), list)
    ]
    return max(1, sum(lengths))


def outcome_of(url: str, path: str, body: Any) -> str:
    """Send and fetch one push; the outcome, in a word."""
    with AtroposClient(ConnectionSettings(url=url, retries=NO_RETRIES)) as client:
        client.reset_data()
        client.register(Registration(batch_size=sequences_of(body), max_token_len=64, num_steps=1))
        client.fetch_batch()  # starts the API
        sent = httpx.post(
            f"{url}{path}",
            content=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
            timeout=PATIENCE,
        )
        if sent.status_code >= 400:
            return "refused by the API"
        try:
            fetched = client.fetch_batch()
        except BatchPossiblyLost:
            return "possibly lost"
        try:
            reply = parse_batch(fetched)
        except InvalidReply:
            return "set aside whole"
    if reply.state != "ready":
        return "kept by the API"
    for rejected in reply.rejected:
        assert rejected.reason
        assert len(rejected.reason) < 500
    pack_everything(reply, "prefix_tree", 50, "group_norm")
    return "trained or set aside" if reply.groups else "set aside"


@pytest.mark.parametrize("path", ["/scored_data", "/scored_data_list"])
def test_what_the_api_says_it_takes_has_one_of_our_outcomes(
    path: str, api: RealApi, pushes: dict[str, st.SearchStrategy[Any]]
) -> None:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=pushes[path], good=groups(), mixed=st.booleans())
    def send(case: Any, good: dict[str, Any], mixed: bool) -> None:
        body = case.body
        if mixed:  # most of what is generated agrees with nothing: a good group, with generated fields in it
            some = [
                group for group in (body if isinstance(body, list) else [body]) if isinstance(group, dict)
            ]
            kept = {key: value for group in some for key, value in group.items() if key not in good}
            group = {**NEIGHBOUR, **good, **kept}
            # Of one size: of several sizes the API forms no batch that holds them all.
            body = group if path == "/scored_data" else [group, {**NEIGHBOUR, **good}]
        seen[outcome_of(api.url, path, body)] += 1

    send()
    assert seen.total() >= EXAMPLES
    assert seen["trained or set aside"] > 0, seen
    assert seen["refused by the API"] < seen.total() / 2, seen

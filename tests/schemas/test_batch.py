"""BatchReply: three states, and bad groups that never spoil the others."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from schemas import BatchReply, ScoredGroup
from tests.schemas.groups import groups
from tests.schemas.test_group import GOOD


def read(batch: Any, **more: Any) -> BatchReply:
    return BatchReply.model_validate_json(json.dumps({"batch": batch, **more}))


def test_the_error_of_an_api_that_was_restarted_means_unregistered() -> None:
    reply = read([], status="error", message="Trainer not registered. Call /register first.")
    assert reply.state == "unregistered"
    assert reply.message == "Trainer not registered. Call /register first."


def test_null_and_an_empty_batch_mean_waiting() -> None:
    assert (read(None).state, read([]).state) == ("waiting", "waiting")
    assert (read(None).groups, read(None).rejected) == ([], [])


def test_data_counts_more_than_a_status() -> None:
    assert read([GOOD], status="error").state == "ready"


bad_groups = st.sampled_from(
    [None, 3, "group", [], {}, {**GOOD, "scores": [1.0]}, {**GOOD, "masks": 7}, {**GOOD, "env_id": True}]
)


@given(st.lists(st.one_of(groups().map(lambda g: (True, g)), bad_groups.map(lambda g: (False, g)))))
def test_good_groups_come_through_whatever_stands_beside_them(mixed: list[tuple[bool, Any]]) -> None:
    reply = read([raw for _, raw in mixed])
    assert reply.groups == [ScoredGroup.model_validate(raw) for good, raw in mixed if good]
    assert [r.index for r in reply.rejected] == [i for i, (good, _) in enumerate(mixed) if not good]
    assert [r.raw for r in reply.rejected] == [raw for good, raw in mixed if not good]
    assert all(r.reason and "\n" not in r.reason for r in reply.rejected)


def test_a_rejected_group_keeps_environment_reason_and_the_raw_object() -> None:
    bad = {**GOOD, "env_id": 5, "masks": [[-100, -100, 40, 2], [-100, 2]]}
    [rejected] = read([GOOD, bad]).rejected
    assert (rejected.index, rejected.env_id, rejected.raw) == (1, 5, bad)
    assert rejected.reason == "tokens[1] has 3 entries but masks[1] has 2"


def test_a_batch_reply_goes_back_to_the_json_it_came_from() -> None:
    raw = {"batch": [GOOD, {"broken": 1}]}
    dumped = json.loads(BatchReply.model_validate(raw).model_dump_json(exclude_none=True))
    assert dumped["batch"][1] == {"broken": 1}
    assert dumped["batch"][0]["tokens"] == GOOD["tokens"]

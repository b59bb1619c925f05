"""BatchReply: three states, and bad groups that never spoil the others."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas import BatchReply, ScoredGroup
from tests.schemas.groups import groups
from tests.schemas.test_group import GOOD


def read(batch: Any, **more: Any) -> BatchReply:
    return BatchReply.model_validate_json(json.dumps({"batch": batch, **more}))


def test_null_means_waiting() -> None:
    reply = read(None)
    assert (reply.state, reply.groups, reply.rejected) == ("waiting", [], [])


def test_an_empty_batch_without_an_error_means_waiting() -> None:
    assert read([]).state == "waiting"


def test_the_error_of_an_api_that_was_restarted_means_unregistered() -> None:
    reply = read([], status="error", message="Trainer not registered. Call /register first.")
    assert reply.state == "unregistered"
    assert reply.message == "Trainer not registered. Call /register first."


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


def test_one_nan_costs_one_group_only() -> None:
    reply = read([GOOD, {**GOOD, "scores": [float("nan"), 1.0]}, GOOD])
    assert len(reply.groups) == 2
    assert reply.rejected[0].reason.startswith("scores[0]: Input should be a finite number")


def test_converted_masks_are_visible_on_the_group_inside_the_batch() -> None:
    reply = read([{**GOOD, "masks": [[0, 0, 1, 1], [0, 0, 1]]}, GOOD])
    assert [g.masks_were_binary for g in reply.groups] == [True, False]


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b'{"batch": [{"tokens"', b"[]", b"{}", b'{"batch": "x"}', b'{"batch": {}}', b"\xff\xfe"],
)
def test_what_is_no_batch_reply_is_refused_as_a_whole(body: bytes) -> None:
    with pytest.raises(ValidationError):
        BatchReply.model_validate_json(body)


def test_a_batch_reply_goes_back_to_the_json_it_came_from() -> None:
    raw = {"batch": [GOOD, {"broken": 1}]}
    dumped = json.loads(BatchReply.model_validate(raw).model_dump_json(exclude_none=True))
    assert dumped["batch"][1] == {"broken": 1}
    assert dumped["batch"][0]["tokens"] == GOOD["tokens"]

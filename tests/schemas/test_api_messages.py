"""The small messages: exactly what the real server's models say, and nothing loose."""

from __future__ import annotations

import json
from typing import Any

import pytest
from atroposlib.api import server
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from schemas import (
    EnvironmentIdentifier,
    EnvironmentStatus,
    InfoReply,
    Registration,
    ScoredGroup,
    StatusReply,
)
from tests.schemas.groups import groups


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Registration, server.Registration),
        (EnvironmentIdentifier, server.EnvIdentifier),
        (ScoredGroup, server.ScoredData),
    ],
)
def test_requests_have_the_fields_of_the_real_server(ours: type[BaseModel], theirs: type[BaseModel]) -> None:
    assert set(ours.model_fields) == set(theirs.model_fields)


@given(st.integers(1, 2**40), st.integers(1, 2**40), st.integers(-1, 2**40), st.text(max_size=5))
def test_the_real_server_accepts_every_registration_that_we_can_build(
    batch_size: int, length: int, steps: int, name: str
) -> None:
    ours = Registration(batch_size=batch_size, max_token_len=length, num_steps=steps, wandb_group=name)
    theirs = server.Registration.model_validate_json(ours.model_dump_json())
    assert theirs.model_dump() == ours.model_dump()


@given(groups())
def test_the_real_server_accepts_every_group_that_we_accept(raw: dict[str, Any]) -> None:
    ours = ScoredGroup.model_validate(raw)
    theirs = server.ScoredData.model_validate_json(ours.model_dump_json(exclude_none=True))
    assert theirs.tokens == ours.tokens
    assert theirs.masks == ours.masks


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (
            EnvironmentStatus,
            {"current_step": 0, "queue_size": 0, "unallocated_fraction": 1, "env_weight": 1.0},
        ),
        (StatusReply, {"current_step": 3, "queue_size": 0}),
        (InfoReply, {"batch_size": -1, "max_token_len": -1}),
    ],
)
def test_replies_read_what_the_server_sends_and_refuse_other_types(
    model: type[BaseModel], body: dict[str, Any]
) -> None:
    reply = model.model_validate_json(json.dumps(body))
    assert {name: getattr(reply, name) for name in body} == body
    for name in body:
        with pytest.raises(ValidationError):
            model.model_validate_json(json.dumps({**body, name: {"no": "such type"}}))


@pytest.mark.parametrize(
    "change", [{"batch_size": 0}, {"max_token_len": -1}, {"num_steps": -2}, {"batch_size": "8"}]
)
def test_a_registration_that_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Registration.model_validate({"batch_size": 8, "max_token_len": 128, "num_steps": 5, **change})


def test_replies_know_what_they_mean() -> None:
    assert not InfoReply(batch_size=-1, max_token_len=-1).registered
    assert InfoReply(batch_size=8, max_token_len=64).registered

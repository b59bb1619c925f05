"""Whatever is sent: a validation error and no other, and what is accepted can be packed and trained on."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas import BatchReply
from tests.hostile.invariants import check_reply
from tests.schemas.groups import groups
from trainer.config import DataSettings, LossSettings
from trainer.packing import Packing, pack
from trainer.samples.advantages import AdvantageNormalizer
from trainer.samples.prepare import prepare_batch
from trainer.samples.validation import ModelLimits

LIMITS = ModelLimits(vocabulary_size=150_000, max_sequence_length=10)

numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from(
        [-100, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, 1e38, -1e38, 1e308, 5e-324, float("nan"), float("inf")]
    ),
)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8), st.just("\ud800"), st.just("NaN")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside a JSON value."""
    children: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


@st.composite
def mutated_batches(draw: st.DrawFn) -> Any:
    """A valid batch in which one to three places were replaced, removed or doubled."""
    batch: Any = json.loads(json.dumps({"batch": draw(st.lists(groups(), min_size=1, max_size=3))}))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(batch)))
        if not path:
            return draw(anything)
        parent = batch
        for key in path[:-1]:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "remove", "double"]))
        if action == "replace":
            parent[path[-1]] = draw(anything)
        elif action == "remove":
            del parent[path[-1]]
        elif isinstance(parent, list):
            parent.insert(path[-1], parent[path[-1]])
    return batch


def read(body: bytes) -> BatchReply | None:
    try:
        reply = BatchReply.model_validate_json(body)
    except ValidationError:
        return None
    check_reply(reply)
    return reply


def pack_everything(reply: BatchReply, packing: Packing, budget: int, estimator: Any) -> None:
    data = DataSettings(advantage_estimator=estimator)
    prepared = prepare_batch(
        reply,
        limits=LIMITS,
        data=data,
        loss=LossSettings(),
        normalizer=AdvantageNormalizer(data.advantage_normalization),
    )
    assert prepared.groups + len(prepared.set_aside) == len(reply.batch or [])
    assert [
        each.group_index for each in prepared.set_aside if each.group_index >= len(reply.batch or [])
    ] == []
    json.dumps([vars(each) for each in prepared.set_aside])
    if not prepared.samples:
        assert prepared.empty_reason is not None
        return
    batches = pack(prepared.samples, prepared.denominators, packing=packing, tokens_per_micro_batch=budget)
    trained = sum(sample.trained_tokens for sample in prepared.samples)
    assert sum(len(batch.targets) for batch in batches) == trained > 0
    for batch in batches:
        assert int(batch.input_ids.max()) < LIMITS.vocabulary_size
        assert int(batch.input_ids.min()) >= 0
        assert bool(torch.isfinite(batch.advantages).all())
        assert bool((batch.denominator > 0).all())
        assert bool((batch.temperature > 0).all())


packings = st.sampled_from(["prefix_tree", "padded"])
estimators = st.sampled_from(["group_norm", "group_center", "leave_one_out", "raw"])


@settings(max_examples=300, deadline=None)
@given(batch=mutated_batches(), packing=packings, budget=st.integers(1, 50), estimator=estimators)
def test_a_mutated_batch_is_read_or_refused_and_what_is_accepted_packs(
    batch: Any, packing: Packing, budget: int, estimator: str
) -> None:
    reply = read(json.dumps(batch).encode())
    if reply is not None:
        pack_everything(reply, packing, budget, estimator)


@settings(max_examples=150, deadline=None)
@given(
    body=st.lists(groups(), max_size=2).map(lambda some: json.dumps({"batch": some}).encode()), data=st.data()
)
def test_a_damaged_body_is_read_or_refused(body: bytes, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(body)))
    end = data.draw(st.integers(start, min(len(body), start + 8)))
    read(body[:start] + data.draw(st.binary(max_size=8)) + body[end:])


@settings(max_examples=150, deadline=None)
@given(
    some=st.lists(groups(), min_size=1, max_size=3),
    packing=packings,
    budget=st.integers(1, 50),
    estimator=estimators,
)
def test_every_valid_batch_packs(some: list[Any], packing: Packing, budget: int, estimator: str) -> None:
    reply = read(json.dumps({"batch": some}).encode())
    assert reply is not None
    assert reply.rejected == []
    pack_everything(reply, packing, budget, estimator)


@pytest.mark.parametrize(
    "body", [b"", b"\x00", b"{", b"[" * 10_000, b'{"batch":[' + b"0" * 100, b'{"batch":[-]}']
)
def test_bodies_that_are_no_json_are_refused(body: bytes) -> None:
    assert read(body) is None

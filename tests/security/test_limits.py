"""Bodies that are small and mean to cost much."""

from __future__ import annotations

import json
import time
import tracemalloc

import pytest

from atropos_client import InvalidReply, parse_batch
from schemas import MAX_CONTAINERS, MAX_GROUPS
from tests.schemas.test_group import GOOD

GOOD_GROUP = json.dumps(GOOD).encode()


@pytest.mark.parametrize(
    "body",
    [b'{"batch":[{"images":' + b"[" * (MAX_CONTAINERS + 1), b'{"batch":[' + b"{}," * (MAX_CONTAINERS + 1)],
)
def test_a_body_of_nothing_but_lists_is_refused_before_it_is_parsed(body: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidReply, match=f"lists and objects, the maximum is {MAX_CONTAINERS}"):
            parse_batch(body)
        assert tracemalloc.get_traced_memory()[1] < len(body)
    finally:
        tracemalloc.stop()


def test_more_groups_than_any_batch_has_are_refused() -> None:
    assert len(parse_batch(b'{"batch":[' + b"{}," * (MAX_GROUPS - 1) + b"{}]}").rejected) == MAX_GROUPS
    with pytest.raises(InvalidReply, match=f"at most {MAX_GROUPS} items"):
        parse_batch(b'{"batch":[' + b"{}," * MAX_GROUPS + b"{}]}")


@pytest.mark.parametrize(
    "spoilt",
    [
        b'{"x": ' + b"[" * 300 + b"]" * 300 + b"}",
        b'{"x": "\xff\xfe"}',
        b'{"x": "\\ud800"}',
        b'{"x": ' + b"9" * 5000 + b"}",
        b'{"x": tru}',
        b"[1, 2, {]",
    ],
    ids=["deep", "no UTF-8", "half a pair", "a long number", "no JSON", "brackets that do not match"],
)
def test_groups_that_are_no_json_are_set_apart(spoilt: bytes) -> None:
    text = b'{ "batch" : [' + GOOD_GROUP + b" , " + spoilt + b",\n" + GOOD_GROUP + b" ] }"
    if spoilt.endswith(b"{]"):
        with pytest.raises(InvalidReply):
            parse_batch(text)
        return
    reply = parse_batch(text)
    assert (reply.state, len(reply.groups)) == ("ready", 2)
    assert [bad.index for bad in reply.rejected] == [1]
    assert reply.rejected[0].reason.startswith("it cannot be read: Invalid JSON")
    assert reply.rejected[0].raw == spoilt.decode("utf-8", errors="backslashreplace")
    json.dumps(reply.rejected[0].raw)


@pytest.mark.parametrize(
    "body",
    [
        b'{"batch":["\xff' + b'\\"' * 4_000_000,
        b'{"batch":[\xff' + b"[]," * 2_000_000,
        b'{"batch":["\xff"' + b',""' * 2_000_000,
        b'{"batch":[' + b" " * 8_000_000 + b"\xff",
        b'{"batch":[{"x":"' + b"\\" * 8_000_000,
    ],
)
def test_cutting_groups_apart_takes_a_time_proportional_to_the_body(body: bytes) -> None:
    started = time.monotonic()
    with pytest.raises(InvalidReply):
        parse_batch(body)
    assert time.monotonic() - started < 60  # seconds for what is linear, hours for what is not

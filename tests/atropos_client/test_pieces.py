"""The parts without a network: retries, pauses, the error tree, the line that says who is late."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atropos_client import RetryPolicy, errors
from atropos_client._retry import may_resend
from atropos_client.backoff import Backoff
from atropos_client.errors import (
    AccessDenied,
    ApiUnreachable,
    AtroposClientError,
    ConnectionLost,
    ErrorStatus,
    InvalidReply,
    ReplyTimeout,
    ReplyTooLarge,
    ServerError,
)
from atropos_client.waiting import EnvironmentFacts, WaitFacts, explain_wait
from schemas import StatusReply

POLICY = RetryPolicy(attempts=4, wall_clock=30.0)


@pytest.mark.parametrize(
    ("error", "again", "again_if_once"),
    [
        (ApiUnreachable("x"), True, True),
        (ReplyTimeout("x"), True, False),
        (ConnectionLost("x"), True, False),
        (ServerError("x", status_code=503), True, False),
        (ServerError("x", status_code=502), True, False),
        (ErrorStatus("x", status_code=429), True, False),
        (ServerError("x", status_code=500), False, False),
        (ErrorStatus("x", status_code=404), False, False),
        (AccessDenied("x", status_code=401), False, False),
        (InvalidReply("x"), False, False),
        (ReplyTooLarge("x"), False, False),
    ],
)
def test_what_is_repeated_depends_on_the_error_and_on_what_a_second_sending_would_do(
    error: AtroposClientError, again: bool, again_if_once: bool
) -> None:
    assert may_resend(error, once=False) is again
    assert may_resend(error, once=True) is again_if_once


def test_attempts_and_wall_clock_both_end_repeating() -> None:
    assert POLICY.allows_another(3, 29.9)
    assert not POLICY.allows_another(4, 29.9)
    assert not POLICY.allows_another(1, 30.1)


@given(st.integers(0, 2**32), st.integers(1, 60))
def test_polling_pauses_double_up_to_the_bound_with_jitter(seed: int, polls: int) -> None:
    backoff = Backoff(first=0.1, longest=2.0, rng=random.Random(seed))
    for poll in range(polls):
        full = min(2.0, 0.1 * 2**poll)
        assert full / 2 <= backoff.next() <= full
    backoff.reset()
    assert backoff.next() <= 0.1


def test_the_error_tree_drawn_in_the_docstring_is_the_real_one() -> None:
    drawing = inspect.getdoc(errors) or ""
    for name, kind in vars(errors).items():
        if not inspect.isclass(kind):
            continue
        line = next(line for line in drawing.splitlines() if name in line.split("  (")[0].split())
        for base in kind.__bases__:
            assert base.__name__ in line or base.__name__ in drawing.partition(line)[0], (name, base)
        assert issubclass(kind, AtroposClientError)


def test_every_error_survives_pickling_with_its_attributes() -> None:
    for kind in vars(errors).values():
        if inspect.isclass(kind) and issubclass(kind, AtroposClientError):
            error = kind("what happened", method="GET", url="http://h/batch")
            back = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
            assert type(back) is kind
            assert str(back) == str(error) == "GET http://h/batch: what happened"
            assert vars(back) == vars(error)


FACTS = WaitFacts(
    url="http://h:8000",
    waited=60.4,
    batch_size=64,
    max_token_len=2048,
    batches=0,
    group_size=None,
    in_flight=None,
    trouble=None,
    status=StatusReply(current_step=0, queue_size=0),
    environments=EnvironmentFacts(
        registered=2, without_groups=(0, 1), largest_group=1, latest_group=None, reserved=False
    ),
)


def among(**changes: object) -> EnvironmentFacts:
    assert FACTS.environments is not None
    return dataclasses.replace(FACTS.environments, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"environments": among(registered=0)}, "no environment connected for 60 s: none is registered"),
        (
            {"environments": among(registered=0), "batches": 9},
            "they have ended, or it was restarted or reset",
        ),
        ({}, "queue 0/64 sequences (0 groups, 2 registered) at http://h:8000; none has sent a group yet"),
        ({}, "a sequence of 2048 tokens or more"),
        (
            {"batches": 2, "group_size": 4.0, "status": StatusReply(current_step=1000, queue_size=0)},
            "1000 by now): start them again with --env.total_steps -1",
        ),
        (
            {"status": StatusReply(current_step=0, queue_size=3), "batches": 1, "group_size": 4.0},
            "environments are late for 60 s: queue 12/64 sequences (3 groups, 2 registered)",
        ),
        (
            {"status": StatusReply(current_step=0, queue_size=3), "environments": among(latest_group=4)},
            "queue 12/64",
        ),
        ({"environments": among(latest_group=3)}, "groups of 3 sequences never make a batch of exactly 64"),
        ({"environments": among(largest_group=12)}, "groups of 12 sequences never make a batch of exactly"),
        (
            {"environments": among(latest_group=4, largest_group=6), "batch_size": 24},
            "groups of 4 sequences do not fit beside groups of 6",
        ),
        (
            {
                "status": StatusReply(current_step=0, queue_size=20),
                "group_size": 4.0,
                "environments": among(reserved=True, without_groups=(1,)),
            },
            "min_batch_allocation, no batch is formed without its share, and nothing waits of environment 1",
        ),
        (
            {"status": StatusReply(current_step=0, queue_size=20), "group_size": 5.0},
            "make the batch size a multiple of every environment's group size",
        ),
        ({"trouble": "status 500"}, "the Atropos API at http://h:8000 fails: status 500"),
        ({"in_flight": 42.0}, "has not answered GET /batch for 42 s"),
        ({"status": None}, "did not tell its status"),
        ({"environments": None}, "did not tell its status"),
    ],
)
def test_the_heartbeat_line_names_who_is_late(changes: dict[str, object], said: str) -> None:
    assert said in explain_wait(dataclasses.replace(FACTS, **changes))  # type: ignore[arg-type]

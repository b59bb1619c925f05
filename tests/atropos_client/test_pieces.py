"""The parts without a network: retries, pauses, the error tree, the shelf, the line that says who is late."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atropos_client import RetryPolicy, Timeouts, errors
from atropos_client._backoff import Backoff
from atropos_client._heartbeat import Heartbeat, WaitFacts, explain_wait
from atropos_client._retry import Resend, pause_before_attempt, should_retry
from atropos_client._shelf import Closed, NothingInTime, Shelf
from atropos_client.errors import (
    AccessDenied,
    ApiUnreachable,
    AtroposClientError,
    BatchNotRecorded,
    ConnectionLost,
    ErrorStatus,
    InvalidReply,
    ReplyTimeout,
    ReplyTooLarge,
    ServerError,
)
from schemas import StatusReply
from tests.atropos_client.misbehaving_server import eventually

POLICY = RetryPolicy(attempts=4, wall_clock=30.0)


def retries(
    error: AtroposClientError, resend: Resend, *, made: int = 1, elapsed: float = 0.0, pause: float = 0.1
) -> bool:
    return should_retry(error, resend=resend, attempts_made=made, elapsed=elapsed, pause=pause, policy=POLICY)


@pytest.mark.parametrize(
    ("error", "harmless", "only_if_not_sent"),
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
    error: AtroposClientError, harmless: bool, only_if_not_sent: bool
) -> None:
    assert retries(error, Resend.HARMLESS) is harmless
    assert retries(error, Resend.ONLY_IF_NOT_SENT) is only_if_not_sent


def test_attempts_and_wall_clock_both_end_repeating() -> None:
    error = ApiUnreachable("x")
    assert retries(error, Resend.HARMLESS, made=3, elapsed=29.8)
    assert not retries(error, Resend.HARMLESS, made=4)
    assert not retries(error, Resend.HARMLESS, elapsed=29.95)
    assert not retries(error, Resend.HARMLESS, pause=31.0)


@given(st.integers(2, 5_000), st.floats(0, 1, exclude_max=True))
def test_pauses_between_sendings_grow_and_stay_bounded(attempt: int, fraction: float) -> None:
    pause = pause_before_attempt(attempt, POLICY, fraction=fraction)
    assert 0 < pause <= POLICY.longest_pause
    assert pause_before_attempt(attempt + 1, POLICY, fraction=fraction) >= pause


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"wall_clock": -1.0}, {"first_pause": float("nan")}])
def test_a_policy_that_makes_no_sense_is_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RetryPolicy(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Timeouts)])
def test_a_timeout_of_zero_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Timeouts(**{name: 0.0})


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
    assert BatchNotRecorded("x", body=b"kept").body == b"kept"


FACTS = WaitFacts(
    url="http://h:8000",
    waited=60.4,
    batch_size=64,
    batches=0,
    group_size=None,
    in_flight=None,
    trouble=None,
    status=StatusReply(current_step=0, queue_size=0),
)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "no environment connected for 60 s"),
        ({"batches": 2, "group_size": 4.0}, "environments are late for 60 s: queue 0/64 sequences"),
        (
            {"status": StatusReply(current_step=0, queue_size=3), "batches": 1, "group_size": 4.0},
            "queue 12/64 sequences (3 groups of about 4)",
        ),
        ({"status": StatusReply(current_step=0, queue_size=3)}, "queue 3 groups, a batch needs 64 sequences"),
        (
            {"status": StatusReply(current_step=0, queue_size=20), "group_size": 5.0},
            "make the batch size a multiple of every environment's group size",
        ),
        ({"trouble": "status 500"}, "the Atropos API at http://h:8000 fails: status 500"),
        ({"in_flight": 42.0}, "has not answered GET /batch for 42 s"),
        ({"status": None}, "did not tell its status"),
    ],
)
def test_the_heartbeat_line_names_who_is_late(changes: dict[str, object], said: str) -> None:
    assert said in explain_wait(dataclasses.replace(FACTS, **changes))  # type: ignore[arg-type]


def test_a_heartbeat_beats_until_it_is_stopped(caplog: pytest.LogCaptureFixture) -> None:
    lines = iter(["one is late", None, "two are late"])
    heartbeat = Heartbeat(0.01, lambda: next(lines, None))
    heartbeat.start()
    eventually(lambda: "two are late" in caplog.text)
    heartbeat.stop()
    assert [record.getMessage() for record in caplog.records] == ["one is late", "two are late"]


def test_a_shelf_hands_over_in_order_and_up_to_its_depth() -> None:
    shelf: Shelf[int] = Shelf(2)
    for item in (1, 2):
        assert shelf.has_room()
        shelf.put(item)
    assert not shelf.has_room()
    assert (shelf.take(0), shelf.take(0)) == (1, 2)
    assert shelf.has_room()


def test_a_shelf_of_depth_zero_has_room_only_while_somebody_waits() -> None:
    shelf: Shelf[int] = Shelf(0)
    assert not shelf.has_room()
    taken: list[int] = []
    taker = threading.Thread(target=lambda: taken.append(shelf.take(20)))
    taker.start()
    assert shelf.wait_for_room()
    shelf.put(7)
    taker.join(20)
    assert taken == [7]
    assert not shelf.has_room()


def test_a_shelf_is_emptied_before_it_says_why_the_producer_ended() -> None:
    shelf: Shelf[int] = Shelf(1)
    shelf.put(1)
    shelf.end(KeyError("gone"))
    assert shelf.take(None) == 1
    for _ in range(2):
        with pytest.raises(KeyError, match="gone"):
            shelf.take(None)


def test_a_shelf_tells_late_from_closed() -> None:
    shelf: Shelf[int] = Shelf(1)
    with pytest.raises(NothingInTime):
        shelf.take(0.01)
    shelf.end(None)
    with pytest.raises(Closed):
        shelf.take(None)


def test_stopping_a_shelf_wakes_its_producer() -> None:
    shelf: Shelf[int] = Shelf(0)
    woken: list[bool] = []
    producer = threading.Thread(target=lambda: woken.extend([shelf.wait_for_room(), shelf.pause(1_000)]))
    producer.start()
    shelf.stop()
    producer.join(20)
    assert woken == [False, False]

"""The poller over a real HTTP server that misbehaves on demand."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from atropos_client import (
    AccessDenied,
    ApiUnreachable,
    AtroposClient,
    BatchNotRecorded,
    BatchPoller,
    BatchPossiblyLost,
    BatchTimeout,
    PollerStopped,
    RetryPolicy,
    Timeouts,
    UnreadableBatch,
)
from schemas import BatchReply, Registration
from tests.atropos_client.misbehaving_server import Answer, MisbehavingServer, closed_port, eventually
from tests.schemas.test_group import GOOD

REGISTRATION = Registration(batch_size=2, max_token_len=128, num_steps=10)
NULL = Answer(body=b'{"batch":null}')
LOST = Answer(status=500, body=b"Internal Server Error")
FORGOTTEN = Answer(body=b'{"status":"error","message":"register first","batch":[]}')
ONCE = RetryPolicy(attempts=1)
PATIENCE = 30.0  # seconds; only ends a hang


def batch(score: float, *more: Any) -> Answer:
    return Answer(body=json.dumps({"batch": [{**GOOD, "scores": [score, 0.0]}, *more]}).encode())


@pytest.fixture(autouse=True)
def _registered(server: MisbehavingServer) -> None:
    server.script("/register", Answer(body=b'{"uuid":1}'))
    server.script("/info", Answer(body=b'{"batch_size":2,"max_token_len":128}'))
    server.script("/status", Answer(body=b'{"current_step":0,"queue_size":0}'))


@contextmanager
def polling(url: str, **options: Any) -> Iterator[BatchPoller]:
    with AtroposClient(url, retries=ONCE, timeouts=options.pop("timeouts", None)) as client:
        defaults = {"first_pause": 0.01, "longest_pause": 0.02, "longest_failure_pause": 0.02}
        with BatchPoller(client, REGISTRATION, **{**defaults, **options}) as poller:
            yield poller


def first_scores(poller: BatchPoller, count: int) -> list[float]:
    return [poller.get(PATIENCE).reply.groups[0].scores[0] for _ in range(count)]


def test_batches_arrive_in_order_with_body_number_and_tag(server: MisbehavingServer) -> None:
    server.script("/batch", NULL, NULL, batch(1.0), batch(2.0), NULL)
    versions = iter(range(7, 100))
    before = time.time()
    with polling(server.url, tag=lambda: next(versions)) as poller:
        one, two = poller.get(PATIENCE), poller.get(PATIENCE)
        counters = poller.counters
    assert [one.number, two.number] == [1, 2]
    assert [one.tag, two.tag] == [7, 8]
    assert one.body == batch(1.0).body
    assert one.reply.groups[0].scores == [1.0, 0.0]
    assert before <= one.received_at <= two.received_at <= time.time()
    assert (counters.batches, counters.groups, counters.sequences) == (2, 2, 4)
    assert counters.empty_replies >= 2
    assert counters.bytes == len(one.body) + len(two.body)
    assert counters.re_registrations == 0


def test_the_first_poll_follows_the_registration_at_once(server: MisbehavingServer) -> None:
    server.script("/batch", NULL)
    with polling(server.url):
        eventually(lambda: server.paths("/batch"))
    assert server.paths()[:3] == ["/register", "/info", "/batch"]
    assert Registration.model_validate_json(server.seen[0].body) == REGISTRATION


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_never_more_than_depth_batches_are_fetched_ahead(server: MisbehavingServer, depth: int) -> None:
    server.script("/batch", *[batch(float(n)) for n in range(10)], NULL)
    with polling(server.url, depth=depth) as poller:
        for taken in range(4):
            eventually(lambda: len(server.paths("/batch")) == depth + taken)  # noqa: B023 - used at once
            # A poller that ran ahead would do so within a few milliseconds.
            time.sleep(0.05)
            assert len(server.paths("/batch")) == depth + taken
            assert first_scores(poller, 1) == [float(taken)]


def test_depth_zero_fetches_only_while_somebody_waits(server: MisbehavingServer) -> None:
    server.script("/batch", NULL, batch(1.0), batch(2.0), NULL)
    with polling(server.url, depth=0) as poller:
        eventually(lambda: server.paths("/batch"))  # the first poll opens the API for environments
        time.sleep(0.05)
        assert len(server.paths("/batch")) == 1
        assert first_scores(poller, 1) == [1.0]
        time.sleep(0.05)
        assert len(server.paths("/batch")) == 2
        assert first_scores(poller, 1) == [2.0]


@pytest.mark.parametrize(
    "lost",
    [
        LOST,
        Answer(hang_up=True),
        Answer(body=batch(9.0).body, cut_at=30),
        Answer(body=b""),
        Answer(body=b"{}", content_type="text/html"),
    ],
)
def test_a_possibly_lost_batch_is_counted_logged_and_polled_past(
    server: MisbehavingServer, lost: Answer, caplog: pytest.LogCaptureFixture
) -> None:
    server.script("/batch", batch(1.0), lost, lost, batch(2.0), NULL)
    with polling(server.url) as poller:
        assert first_scores(poller, 2) == [1.0, 2.0]
        assert poller.counters.possibly_lost == 2
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert "possibly lost" in errors[0].getMessage()


def test_an_api_that_forgot_us_is_registered_with_again(server: MisbehavingServer) -> None:
    server.script("/batch", batch(1.0), FORGOTTEN, NULL, batch(2.0), NULL)
    with polling(server.url) as poller:
        assert first_scores(poller, 2) == [1.0, 2.0]
        counters = poller.counters
    assert (counters.registrations, counters.re_registrations) == (2, 1)
    assert len(server.paths("/register")) == 2


def test_an_api_that_was_reset_and_answers_500_is_registered_with_again(server: MisbehavingServer) -> None:
    server.script("/info", *[Answer(body=b) for b in _infos((2, 128), (-1, -1), (2, 128))])
    server.script("/batch", batch(1.0), LOST, batch(2.0), NULL)
    with polling(server.url) as poller:
        assert first_scores(poller, 2) == [1.0, 2.0]
        assert poller.counters.re_registrations == 1


def _infos(*pairs: tuple[int, int]) -> list[bytes]:
    return [json.dumps({"batch_size": b, "max_token_len": t}).encode() for b, t in pairs]


def test_each_registration_is_asked_for_anew(server: MisbehavingServer) -> None:
    server.script("/batch", NULL, FORGOTTEN, batch(1.0), NULL)
    steps = iter([0, 17])

    def registration() -> Registration:
        return Registration(batch_size=2, max_token_len=128, num_steps=99, starting_step=next(steps))

    with AtroposClient(server.url) as client, BatchPoller(client, registration, first_pause=0.01) as poller:
        poller.get(PATIENCE)
    sent = [Registration.model_validate_json(s.body) for s in server.seen if s.path == "/register"]
    assert [r.starting_step for r in sent] == [0, 17]


def test_an_earlier_registration_that_stays_in_force_is_warned_about(
    server: MisbehavingServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.script("/info", Answer(body=b'{"batch_size":512,"max_token_len":9}'))
    server.script("/batch", batch(1.0), NULL)
    with polling(server.url) as poller:
        poller.get(PATIENCE)
    assert "keeps an earlier registration: batches of 512 sequences of at most 9 tokens" in caplog.text


def test_rejected_groups_and_converted_masks_are_counted_and_named(
    server: MisbehavingServer, caplog: pytest.LogCaptureFixture
) -> None:
    bad = {**GOOD, "env_id": 4, "scores": [1.0]}
    binary = {**GOOD, "masks": [[0, 0, 1, 1], [0, 0, 1]]}
    server.script("/batch", batch(1.0, bad, binary), NULL)
    with polling(server.url) as poller:
        polled = poller.get(PATIENCE)
        counters = poller.counters
    assert [r.index for r in polled.reply.rejected] == [1]
    assert (counters.groups, counters.rejected_groups, counters.binary_mask_groups) == (2, 1, 1)
    assert "1 of 3 groups cannot be trained on; the first is group 1 of environment 4: scores" in caplog.text


def test_a_batch_of_nothing_but_bad_groups_is_still_handed_over(server: MisbehavingServer) -> None:
    server.script("/batch", Answer(body=b'{"batch":[{"broken":1}]}'), NULL)
    with polling(server.url) as poller:
        polled = poller.get(PATIENCE)
    assert (polled.reply.groups, len(polled.reply.rejected), polled.sequence_count) == ([], 1, 0)


def test_every_body_but_the_empty_one_is_recorded_before_it_is_parsed(server: MisbehavingServer) -> None:
    bodies = [b'{"batch": [', batch(1.0).body]
    server.script("/batch", NULL, *[Answer(body=b) for b in bodies], NULL)
    recorded: list[bytes] = []
    with polling(server.url, on_body=recorded.append) as poller:
        assert poller.get(PATIENCE).unreadable is not None
        assert poller.get(PATIENCE).unreadable is None
    assert recorded == bodies


def test_a_whole_body_that_is_no_batch_is_handed_over_and_not_counted_as_lost(
    server: MisbehavingServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.script("/batch", Answer(body=b"not json"), batch(2.0), NULL)
    with polling(server.url) as poller:
        bad = poller.get(PATIENCE)
        assert (bad.body, bad.reply.groups) == (b"not json", [])
        assert "Invalid JSON" in (bad.unreadable or "")
        assert first_scores(poller, 1) == [2.0]
        assert (poller.counters.unreadable, poller.counters.possibly_lost) == (1, 0)
    assert "set aside whole" in caplog.text


def test_an_api_that_only_ever_sends_what_is_no_batch_is_given_up(server: MisbehavingServer) -> None:
    server.script("/batch", Answer(body=b"not json"))
    with polling(server.url, depth=100, patience=0.2) as poller, pytest.raises(UnreadableBatch):
        list(iter(lambda: poller.get(PATIENCE).unreadable, None))


def test_a_journal_that_fails_ends_the_poller_and_hands_out_the_body(server: MisbehavingServer) -> None:
    server.script("/batch", batch(1.0), NULL)

    def full(body: bytes) -> None:
        raise OSError(28, "No space left on device")

    with polling(server.url, on_body=full) as poller, pytest.raises(BatchNotRecorded) as caught:
        poller.get(PATIENCE)
    assert caught.value.body == batch(1.0).body
    assert "No space left" in str(caught.value)


def test_get_raises_what_killed_the_thread_after_the_batches_before_it(server: MisbehavingServer) -> None:
    server.script("/batch", batch(1.0), batch(2.0), NULL)

    def tag() -> int:
        if len(server.paths("/batch")) > 1:
            raise ZeroDivisionError("a defect in the caller's tag")
        return 0

    with polling(server.url, tag=tag) as poller:
        assert first_scores(poller, 1) == [1.0]
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                poller.get(PATIENCE)


@pytest.mark.parametrize("path", ["/register", "/batch"])
def test_credentials_that_never_worked_end_the_poller(server: MisbehavingServer, path: str) -> None:
    server.script("/batch", NULL)
    server.script(path, Answer(status=401))
    with polling(server.url) as poller, pytest.raises(AccessDenied):
        poller.get(PATIENCE)


def test_a_refusal_in_the_middle_of_a_run_is_outlasted(server: MisbehavingServer) -> None:
    server.script("/batch", batch(1.0), Answer(status=404), Answer(status=403), batch(2.0), NULL)
    with polling(server.url) as poller:
        assert first_scores(poller, 2) == [1.0, 2.0]
        assert poller.counters.failed_requests == 2
        assert poller.counters.possibly_lost == 0


def test_an_api_that_never_comes_ends_the_poller_when_its_patience_does() -> None:
    with polling(f"http://127.0.0.1:{closed_port()}", patience=0.2) as poller:
        with pytest.raises(ApiUnreachable):
            poller.get(PATIENCE)
        assert poller.counters.failed_requests > 1


def test_an_api_that_only_fails_ends_the_poller_when_its_patience_does(server: MisbehavingServer) -> None:
    server.script("/batch", LOST)
    with polling(server.url, patience=0.2) as poller, pytest.raises(BatchPossiblyLost):
        poller.get(PATIENCE)


def test_waiting_in_vain_says_who_is_late(server: MisbehavingServer) -> None:
    server.script("/batch", NULL)
    with polling(server.url) as poller:
        eventually(lambda: poller.counters.empty_replies)
        with pytest.raises(BatchTimeout, match=r"no batch within 0\.1 s: no environment connected"):
            poller.get(0.1)


def test_the_heartbeat_logs_the_queue_while_we_wait(
    server: MisbehavingServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.script("/batch", batch(1.0), NULL)
    server.script("/status", Answer(body=b'{"current_step":1,"queue_size":0}'))
    with polling(server.url, heartbeat=0.05) as poller:
        poller.get(PATIENCE)
        eventually(lambda: "queue 0/2 sequences (0 groups of about 2)" in caplog.text)


def test_the_heartbeat_is_silent_while_a_batch_lies_ready(
    server: MisbehavingServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.script("/batch", batch(1.0), NULL)
    with polling(server.url, heartbeat=0.02) as poller:
        eventually(lambda: poller.counters.batches)
        caplog.clear()
        time.sleep(0.2)
        assert "late" not in caplog.text


def test_a_poll_that_hangs_is_named_and_does_not_hold_up_stopping(
    server: MisbehavingServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.script("/batch", Answer(body=b'{"batch":null}', delay=PATIENCE))
    timeouts = Timeouts(batch_read=2 * PATIENCE)
    with AtroposClient(server.url, retries=ONCE, timeouts=timeouts) as client:
        poller = BatchPoller(client, REGISTRATION).start()
        eventually(lambda: server.paths("/batch"))
        started = time.monotonic()
        poller.stop(timeout=0.1)
        assert time.monotonic() - started < PATIENCE / 2
        assert poller.counters.possibly_lost == 1
        assert "possibly lost" in caplog.text
        server.release()
        eventually(lambda: "atropos-poller" not in [t.name for t in threading.enumerate()])


@pytest.mark.parametrize(
    "options", [{"first_pause": 100.0, "longest_pause": 100.0}, {"depth": 0}], ids=["pausing", "no room"]
)
def test_stopping_is_quick_and_leaves_no_thread(server: MisbehavingServer, options: dict[str, Any]) -> None:
    server.script("/batch", NULL)
    with polling(server.url, **options) as poller:
        eventually(lambda: poller.counters.empty_replies)
        started = time.monotonic()
        assert poller.stop(timeout=PATIENCE) == []
        assert time.monotonic() - started < PATIENCE / 2
        assert "atropos-poller" not in [thread.name for thread in threading.enumerate()]
        with pytest.raises(PollerStopped):
            poller.get()


def test_stopping_wakes_whoever_waits_in_get(server: MisbehavingServer) -> None:
    server.script("/batch", NULL)
    ended: list[type[BaseException]] = []

    def wait(get: Callable[[], object]) -> None:
        try:
            get()
        except PollerStopped as error:
            ended.append(type(error))

    with polling(server.url) as poller:
        waiter = threading.Thread(target=wait, args=(poller.get,))
        waiter.start()
        eventually(lambda: poller.counters.empty_replies)
        poller.stop()
        waiter.join(PATIENCE)
    assert ended == [PollerStopped]


def test_stopping_hands_back_what_nobody_took(server: MisbehavingServer) -> None:
    server.script("/batch", batch(1.0), batch(2.0), NULL)
    with polling(server.url, depth=2) as poller:
        eventually(lambda: poller.counters.batches == 2)
        left = poller.stop()
        assert [polled.number for polled in left] == [1, 2]
        assert poller.stop() == []


def test_a_poller_that_was_not_started_says_so(server: MisbehavingServer) -> None:
    with AtroposClient(server.url) as client:
        poller = BatchPoller(client, REGISTRATION)
        with pytest.raises(PollerStopped, match="not started"):
            poller.get(1)
        assert poller.stop() == []


@pytest.mark.parametrize("wrong", [{"depth": -1}, {"heartbeat": 0}, {"patience": 0}, {"first_pause": 0}])
def test_options_that_make_no_sense_are_refused(server: MisbehavingServer, wrong: dict[str, Any]) -> None:
    with AtroposClient(server.url) as client, pytest.raises(ValueError, match="0"):
        BatchPoller(client, REGISTRATION, **wrong)


def test_batches_are_prepared_in_order_in_the_pollers_thread(server: MisbehavingServer) -> None:
    server.script("/batch", batch(1.0), batch(2.0), NULL)
    threads: list[str] = []

    def prepare(reply: BatchReply) -> float:
        threads.append(threading.current_thread().name)
        return reply.groups[0].scores[0]

    with polling(server.url, prepare=prepare) as poller:
        taken = [poller.get(PATIENCE) for _ in range(2)]
    assert [polled.prepared for polled in taken] == [1.0, 2.0]
    assert set(threads) == {"atropos-poller"}


def test_what_preparing_raises_travels_with_its_batch_and_polling_goes_on(server: MisbehavingServer) -> None:
    server.script("/batch", batch(1.0), batch(2.0), NULL)

    def prepare(reply: BatchReply) -> str:
        if reply.groups[0].scores[0] == 1.0:
            raise LookupError("not this one")
        return "fine"

    with polling(server.url, prepare=prepare) as poller:
        bad, good = poller.get(PATIENCE), poller.get(PATIENCE)
    assert isinstance(bad.failure, LookupError)
    assert (bad.body, bad.prepared) == (batch(1.0).body, None)
    assert (good.failure, good.prepared) == (None, "fine")


def test_a_server_may_ask_for_a_longer_pause_but_not_for_one_without_end(server: MisbehavingServer) -> None:
    busy = Answer(status=429, headers={"Retry-After": "1" + "0" * 400}, body=b"slow down")
    server.script("/batch", busy, batch(1.0), NULL)
    started = time.monotonic()
    with polling(server.url, longest_failure_pause=0.4) as poller:
        assert first_scores(poller, 1) == [1.0]
        assert poller.counters.possibly_lost == 0
    assert time.monotonic() - started >= 0.4

"""Fetching over a real HTTP server that misbehaves on demand, in a thread of the test.

`test_fetching_process.py` has what only a process can show.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from atropos_client import (
    NO_RETRIES,
    FetcherStopped,
    JournalError,
    JournalFull,
    Timeouts,
    UnreadableBatch,
)
from atropos_client._reading import claims_batch
from atropos_client.fetcher import Fetcher, FetcherSettings
from atropos_client.journal import Journal, JournalLimits
from schemas import BatchReply, Registration
from tests.atropos_client.in_thread import ThreadFetcher
from tests.atropos_client.misbehaving_server import Answer, MisbehavingServer, eventually
from tests.schemas.test_group import GOOD

pytestmark = pytest.mark.usefixtures("registered")

REGISTRATION = Registration(batch_size=2, max_token_len=128, num_steps=10)
NULL = Answer(body=b'{"batch":null}')
LOST = Answer(status=500, body=b"Internal Server Error")
FORGOTTEN = Answer(body=b'{"status":"error","message":"register first","batch":[]}')
PATIENCE = 30.0  # seconds; only ends a hang


def batch(score: float, *more: Any) -> Answer:
    return Answer(body=json.dumps({"batch": [{**GOOD, "scores": [score, 0.0]}, *more]}).encode())


def settings_for(url: str, **more: Any) -> FetcherSettings:
    quick: dict[str, Any] = {"first_pause": 0.01, "longest_pause": 0.02, "longest_failure_pause": 0.02}
    defaults = {"registration": REGISTRATION, "farewell": 20.0, "retries": NO_RETRIES, **quick}
    return FetcherSettings(url=url, **{**defaults, **more})


@contextmanager
def fetching(
    journal: Journal, url: str, kind: type[Fetcher] = ThreadFetcher, **options: Any
) -> Iterator[Fetcher]:
    names = FetcherSettings.model_fields.keys()
    settings = settings_for(url, **{name: options.pop(name) for name in names & options.keys()})
    with kind(journal, settings, **{"after": 0, **options}) as fetcher:
        yield fetcher


def first_scores(fetcher: Fetcher, count: int) -> list[float]:
    return [fetcher.get(PATIENCE).reply.groups[0].scores[0] for _ in range(count)]


# What comes.


def test_batches_come_in_order_from_the_journal_with_number_version_and_body(
    server: MisbehavingServer, journal: Journal
) -> None:
    server.script("/batch", NULL, NULL, batch(1.0), batch(2.0), NULL)
    with fetching(journal, server.url, served_version=lambda: 7) as fetcher:
        one, two = fetcher.get(PATIENCE), fetcher.get(PATIENCE)
        counters = fetcher.counters
    assert fetcher.counters.polls >= counters.polls  # also when it was stopped
    assert [one.number, two.number] == [1, 2]
    assert [one.served_version, two.served_version] == [7, 7]
    assert one.body == batch(1.0).body == journal.read(1).body
    assert two.reply.groups[0].scores == [2.0, 0.0]
    assert (counters.batches, counters.groups, counters.sequences) == (2, 2, 4)
    assert counters.empty_replies >= 2
    assert counters.bytes == len(one.body) + len(two.body)
    assert (counters.registrations, counters.re_registrations) == (1, 0)


def test_a_changed_version_is_recorded_with_what_arrives_after_it(
    server: MisbehavingServer, journal: Journal
) -> None:
    server.script("/batch", batch(1.0), NULL)
    version = 3
    with fetching(journal, server.url, served_version=lambda: version) as fetcher:
        assert fetcher.get(PATIENCE).served_version == 3
        version = 4
        eventually(lambda: journal.marks.get("version") == 4)
        server.script("/batch", batch(2.0), NULL)
        assert fetcher.get(PATIENCE).served_version == 4


def test_a_reply_that_holds_no_batch_is_not_journaled(server: MisbehavingServer, journal: Journal) -> None:
    server.script("/batch", NULL, FORGOTTEN, Answer(body=b'{"batch": [ ]}'), batch(1.0), NULL)
    with fetching(journal, server.url) as fetcher:
        assert fetcher.get(PATIENCE).number == 1
    assert journal.numbers_after(0) == [1]


def test_the_first_poll_follows_the_registration_at_once(server: MisbehavingServer, journal: Journal) -> None:
    server.script("/batch", NULL)
    with fetching(journal, server.url):
        eventually(lambda: server.paths("/batch"))
    assert server.paths()[:3] == ["/register", "/info", "/batch"]
    assert Registration.model_validate_json(server.seen[0].body) == REGISTRATION


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_never_more_than_depth_batches_are_fetched_ahead(
    server: MisbehavingServer, journal: Journal, depth: int
) -> None:
    server.script("/batch", *[batch(float(n)) for n in range(10)], NULL)
    with fetching(journal, server.url, depth=depth) as fetcher:
        for taken in range(3):
            eventually(lambda: journal.last_number == depth + taken)  # noqa: B023 - used at once
            time.sleep(0.05)  # one that ran ahead would do so within a few milliseconds
            assert len(server.paths("/batch")) == depth + taken
            assert first_scores(fetcher, 1) == [float(taken)]


def test_depth_zero_fetches_and_prepares_only_while_somebody_waits(
    server: MisbehavingServer, journal: Journal
) -> None:
    prepared: list[BatchReply] = []
    server.script("/batch", NULL, batch(1.0), batch(2.0), NULL)
    with fetching(journal, server.url, depth=0, prepare=prepared.append) as fetcher:
        eventually(lambda: server.paths("/batch"))  # the first poll opens the API for environments
        for number in (1, 2):
            time.sleep(0.05)
            assert (len(server.paths("/batch")), len(prepared)) == (number, number - 1)
            assert fetcher.get(PATIENCE).number == number


def test_depth_zero_hands_out_a_batch_that_the_first_poll_brought_and_then_fetches_on(
    server: MisbehavingServer, journal: Journal
) -> None:
    server.script("/batch", batch(1.0), batch(2.0), NULL)
    with fetching(journal, server.url, depth=0) as fetcher:
        eventually(lambda: journal.last_number == 1)
        assert [fetcher.get(PATIENCE).number for _ in range(2)] == [1, 2]


def test_what_waits_in_the_journal_comes_first_is_not_counted_and_then_comes_what_is_new(
    server: MisbehavingServer, journal: Journal
) -> None:
    for score in range(1, 6):
        journal.append(batch(float(score)).body, served_version=score)
    for number in (1, 2, 3):
        journal.settle(number, "trained", step=number)
    server.script("/batch", NULL)
    with fetching(journal, server.url, after=2) as fetcher:
        batches = [fetcher.get(PATIENCE) for _ in range(3)]
        assert (fetcher.counters.batches, fetcher.counters.groups) == (0, 0)
        server.script("/batch", batch(6.0), NULL)
        batches.append(fetcher.get(PATIENCE))
    assert [each.number for each in batches] == [3, 4, 5, 6]
    assert [each.served_version for each in batches] == [3, 4, 5, -1]
    assert [entry.outcome for entry in journal.ledger()][:3] == ["trained", "trained", "received"]


def test_batches_are_prepared_in_order_while_nobody_waits_and_a_failure_travels_with_its_batch(
    server: MisbehavingServer, journal: Journal
) -> None:
    server.script("/batch", batch(1.0), batch(2.0), batch(3.0), NULL)
    seen: list[float] = []

    def prepare(reply: BatchReply) -> float:
        seen.append(reply.groups[0].scores[0])
        if seen[-1] == 2.0:
            raise ValueError("cannot be prepared")
        return seen[-1]

    with fetching(journal, server.url, depth=3, prepare=prepare) as fetcher:
        eventually(lambda: len(seen) == 3)
        one, two, three = (fetcher.get(PATIENCE) for _ in range(3))
    assert seen == [1.0, 2.0, 3.0]
    assert (one.prepared, two.prepared, three.prepared) == (1.0, None, 3.0)
    assert str(two.failure) == "cannot be prepared"


def test_rejected_groups_and_converted_masks_are_counted_and_named(
    server: MisbehavingServer, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    bad = {**GOOD, "env_id": 4, "scores": [1.0]}
    binary = {**GOOD, "masks": [[0, 0, 1, 1], [0, 0, 1]]}
    server.script("/batch", batch(1.0, bad, binary), NULL)
    with fetching(journal, server.url) as fetcher:
        assert [r.index for r in fetcher.get(PATIENCE).reply.rejected] == [1]
        counters = fetcher.counters
    assert (counters.groups, counters.rejected_groups, counters.binary_mask_groups) == (2, 1, 1)
    assert "1 of 3 groups cannot be trained on; the first is group 1 of environment 4: scores" in caplog.text


@pytest.mark.parametrize(
    "bad", [b"not json", b'{"batch": [', b'{"detail":"' + b"x" * 5000 + b'"}', b'{"batch":[!!!}']
)
def test_a_whole_body_that_is_no_batch_is_recorded_handed_out_marked_and_not_counted_as_lost(
    server: MisbehavingServer, journal: Journal, bad: bytes
) -> None:
    server.script("/batch", Answer(body=bad), batch(2.0), NULL)
    with fetching(journal, server.url) as fetcher:
        unreadable = fetcher.get(PATIENCE)
        assert (unreadable.number, unreadable.body, unreadable.reply.groups) == (1, bad, [])
        assert "is no BatchReply" in (unreadable.unreadable or "")
        assert first_scores(fetcher, 1) == [2.0]
        eventually(lambda: fetcher.counters.unreadable)  # counted after it was recorded
        assert (fetcher.counters.unreadable, fetcher.counters.possibly_lost) == (1, 0)
    assert journal.read(1).body == bad


def test_who_reads_a_body_is_told_by_its_ends() -> None:
    assert claims_batch(batch(1.0).body)
    assert claims_batch(b' {"batch" : [ {} ] }\n')
    for body in (NULL.body, FORGOTTEN.body, b'{"batch": []}', b'{"batch": [{', b"[]", b""):
        assert not claims_batch(body), body


@pytest.mark.parametrize("bad", [b"not json", b'{"batch":[!!!}'], ids=["no batch", "claims to be one"])
def test_an_api_that_only_ever_sends_what_is_no_batch_is_given_up(
    server: MisbehavingServer, journal: Journal, bad: bytes
) -> None:
    server.script("/batch", Answer(body=bad))
    with (
        fetching(journal, server.url, depth=3, patience=0.2) as fetcher,
        pytest.raises(UnreadableBatch),
    ):
        list(iter(lambda: fetcher.get(PATIENCE).unreadable, None))


def test_a_batch_to_skip_is_handed_out_unread_and_one_that_is_read_is_noted(
    server: MisbehavingServer, journal: Journal
) -> None:
    server.script("/batch", NULL)
    for number in (1, 2):
        journal.append(batch(float(number)).body)
    journal.skip(1, "it is too large")
    read: list[BatchReply] = []

    def prepare(reply: BatchReply) -> None:
        read.append(reply)
        raise MemoryError

    with fetching(journal, server.url, prepare=prepare) as fetcher:
        first = fetcher.get(PATIENCE)
        assert (first.unreadable, first.body) == ("it is too large", batch(1.0).body)
        with pytest.raises(JournalError, match="not enough memory to read batch 2"):
            fetcher.get(PATIENCE)
    assert len(read) == 1
    assert journal.marks.blame() is None  # the first time
    assert journal.marks.get("suspect") == 2


# What the API does to us.


@pytest.mark.parametrize("lost", [LOST, Answer(body=b"")])
def test_a_possibly_lost_batch_is_counted_logged_and_polled_past(
    server: MisbehavingServer, journal: Journal, lost: Answer, caplog: pytest.LogCaptureFixture
) -> None:
    server.script("/batch", batch(1.0), lost, lost, batch(2.0), NULL)
    with fetching(journal, server.url) as fetcher:
        assert first_scores(fetcher, 2) == [1.0, 2.0]
        assert fetcher.counters.possibly_lost == 2
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert "possibly lost" in errors[0].getMessage()


def test_an_api_that_forgot_us_is_registered_with_again_with_the_current_step(
    server: MisbehavingServer, journal: Journal
) -> None:
    server.script("/batch", batch(1.0), FORGOTTEN, NULL, batch(2.0), NULL)
    steps = iter([0] + [17] * 10**6)
    with fetching(journal, server.url, step=lambda: next(steps)) as fetcher:
        assert first_scores(fetcher, 2) == [1.0, 2.0]
        counters = fetcher.counters
    assert (counters.registrations, counters.re_registrations) == (2, 1)
    sent = [Registration.model_validate_json(s.body) for s in server.seen if s.path == "/register"]
    assert sent[-1].starting_step == 17


def test_an_api_that_was_reset_and_answers_500_is_registered_with_again(
    server: MisbehavingServer, journal: Journal
) -> None:
    server.script("/info", *[Answer(body=b) for b in _infos((2, 128), (-1, -1), (2, 128))])
    server.script("/batch", batch(1.0), LOST, batch(2.0), NULL)
    with fetching(journal, server.url) as fetcher:
        assert first_scores(fetcher, 2) == [1.0, 2.0]
        assert fetcher.counters.re_registrations == 1


def _infos(*pairs: tuple[int, int]) -> list[bytes]:
    return [json.dumps({"batch_size": b, "max_token_len": t}).encode() for b, t in pairs]


def test_a_refusal_in_the_middle_of_a_run_is_outlasted(server: MisbehavingServer, journal: Journal) -> None:
    server.script("/batch", batch(1.0), Answer(status=404), Answer(status=403), batch(2.0), NULL)
    with fetching(journal, server.url) as fetcher:
        assert first_scores(fetcher, 2) == [1.0, 2.0]
        assert (fetcher.counters.failed_requests, fetcher.counters.possibly_lost) == (2, 0)
        eventually(lambda: journal.marks.trouble is None)  # noted after the batch was announced


def test_a_server_may_ask_for_a_longer_pause_but_not_for_one_without_end(
    server: MisbehavingServer, journal: Journal
) -> None:
    busy = Answer(status=429, headers={"Retry-After": "1" + "0" * 400}, body=b"slow down")
    server.script("/batch", busy, batch(1.0), NULL)
    started = time.monotonic()
    with fetching(journal, server.url, longest_failure_pause=0.4) as fetcher:
        assert first_scores(fetcher, 1) == [1.0]
        assert fetcher.counters.possibly_lost == 0
    assert time.monotonic() - started >= 0.4


def test_a_full_journal_ends_the_fetching_before_the_next_poll(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    server.script("/batch", batch(1.0), batch(2.0), NULL)
    limits = JournalLimits(max_bytes=150_000, expected_bytes=80_000)
    with Journal.open(tmp_path / "small", limits=limits) as journal:
        journal.append(os.urandom(50_000))
        journal.settle(1, "trained", step=1)
        with fetching(journal, server.url, after=1) as fetcher, pytest.raises(JournalFull, match="no room"):
            fetcher.get(PATIENCE)
    assert server.paths("/batch") == []


def test_get_raises_what_ended_the_fetching_after_the_batches_before_it(
    server: MisbehavingServer, journal: Journal
) -> None:
    server.script("/batch", batch(1.0), batch(2.0), NULL)

    def version() -> int:
        if journal.last_number:
            raise ZeroDivisionError("a defect in what the caller gave")
        return 0

    with fetching(journal, server.url, served_version=version) as fetcher:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                fetcher.get(PATIENCE)


# Who is late.


def test_waiting_in_vain_says_who_is_late(server: MisbehavingServer, journal: Journal) -> None:
    server.script("/batch", NULL)
    with fetching(journal, server.url) as fetcher:
        eventually(lambda: fetcher.counters.empty_replies)
        assert [fetcher.get(0.01) for _ in range(5)] == [None] * 5
        assert {request.path for request in server.seen} == {"/register", "/info", "/batch"}
        assert fetcher.explain_wait().startswith("no environment connected")


def test_waiting_while_the_api_fails_says_of_what(server: MisbehavingServer, journal: Journal) -> None:
    server.script("/batch", LOST)
    with fetching(journal, server.url) as fetcher:
        eventually(lambda: fetcher.counters.possibly_lost)
        said = fetcher.explain_wait()
    assert re.search(r"API at http://\S+ fails: GET \S+/batch: .* status 500", said), said


def test_the_heartbeat_logs_the_queue_while_we_wait_and_is_silent_while_a_batch_lies_ready(
    server: MisbehavingServer, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    server.script("/batch", batch(1.0), NULL)
    server.script("/status", Answer(body=b'{"current_step":1,"queue_size":3}'))
    with fetching(journal, server.url, heartbeat=0.05) as fetcher:
        eventually(lambda: fetcher._lateness.wanting_since is None)
        caplog.clear()
        time.sleep(0.2)
        assert "late" not in caplog.text
        fetcher.get(PATIENCE)
        eventually(lambda: "queue 6/2 sequences (3 groups, 0 registered)" in caplog.text)


def test_a_wait_for_the_preparation_of_a_batch_is_not_blamed_on_the_api(
    server: MisbehavingServer, journal: Journal
) -> None:
    server.script("/batch", batch(1.0), NULL)
    release = threading.Event()
    with fetching(journal, server.url, prepare=lambda _: release.wait(PATIENCE)) as fetcher:
        eventually(lambda: "batch 1 is recorded, and being read and prepared" in fetcher.explain_wait())
        release.set()
        assert fetcher.get(PATIENCE).number == 1


# Stopping.


def test_a_poll_that_hangs_is_named_and_does_not_hold_up_stopping(
    server: MisbehavingServer, journal: Journal
) -> None:
    server.script("/batch", Answer(body=b'{"batch":null}', delay=PATIENCE))
    with fetching(journal, server.url, timeouts=Timeouts(batch_read=2 * PATIENCE)) as fetcher:
        eventually(lambda: journal.marks.get("polling_since"))
        facts = dataclasses.replace(fetcher._lateness._asked_facts(), trouble=None)
        assert facts.in_flight is not None
        assert 0 <= facts.in_flight < PATIENCE
        started = time.monotonic()
        fetcher.stop(timeout=0.1)
        assert time.monotonic() - started < PATIENCE / 2
        server.release()
        eventually(lambda: not fetcher._listener.is_alive())


@pytest.mark.parametrize(
    "options", [{"first_pause": 100.0, "longest_pause": 100.0}, {"depth": 0}], ids=["pausing", "no room"]
)
def test_stopping_is_quick_leaves_no_thread_and_wakes_whoever_waits(
    server: MisbehavingServer, journal: Journal, options: dict[str, Any]
) -> None:
    server.script("/batch", NULL)
    ended: list[type[BaseException]] = []

    def wait(get: Callable[[], object]) -> None:
        try:
            get()
        except FetcherStopped as error:
            ended.append(type(error))

    with fetching(journal, server.url, **options) as fetcher:
        eventually(lambda: fetcher.counters.empty_replies)
        waiter = threading.Thread(target=wait, args=(fetcher.get,))
        waiter.start()
        started = time.monotonic()
        fetcher.stop(timeout=PATIENCE)
        waiter.join(PATIENCE)
        assert time.monotonic() - started < PATIENCE / 2
        names = {"atropos-poller", "atropos-fetcher", "atropos-loader"}
        assert not names & {thread.name for thread in threading.enumerate()}
        with pytest.raises(FetcherStopped):
            fetcher.get()
    assert ended == [FetcherStopped]


def test_what_nobody_took_waits_in_the_journal(server: MisbehavingServer, journal: Journal) -> None:
    server.script("/batch", batch(1.0), batch(2.0), NULL)
    with fetching(journal, server.url, depth=2) as fetcher:
        eventually(lambda: journal.last_number == 2)
        fetcher.stop()
        fetcher.stop()
    assert [entry.outcome for entry in journal.ledger()] == ["received", "received"]


def test_wrong_use_is_refused(server: MisbehavingServer, journal: Journal) -> None:
    settings = settings_for(server.url)
    with Journal.read_only(journal.directory) as reader, pytest.raises(ValueError, match="reading only"):
        Fetcher(reader, settings, after=0)
    fetcher = Fetcher(journal, settings, after=0)
    with pytest.raises(FetcherStopped, match="not started"):
        fetcher.get(1)
    fetcher.stop()


@pytest.mark.parametrize("wrong", [{"heartbeat": 0}, {"patience": 0}, {"first_pause": 0}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        settings_for("http://127.0.0.1:1", **wrong)

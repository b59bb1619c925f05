"""The fetching process: it behaves like a poller, and no end of the trainer costs a batch."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from atropos_client import (
    AccessDenied,
    AtroposClient,
    BatchNotRecorded,
    BatchTimeout,
    FetcherDied,
    JournalFull,
    PollerStopped,
    Timeouts,
)
from atropos_client.fetcher import FetcherSettings, FetchingProcess
from atropos_client.fetcher._lines import LineWriter, LogSender, error_from_message, error_to_message
from atropos_client.journal import Journal, JournalLimits
from schemas import BatchReply, Registration
from tests.atropos_client.misbehaving_server import Answer, MisbehavingServer, eventually
from tests.atropos_client.test_poller import FORGOTTEN, NULL, PATIENCE, REGISTRATION, batch
from tests.atropos_client.test_real_api import RealApi, group

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.slow


def settings_for(url: str, **more: Any) -> FetcherSettings:
    quick: dict[str, Any] = {"first_pause": 0.01, "longest_pause": 0.05, "longest_failure_pause": 0.1}
    return FetcherSettings(url=url, **{"registration": REGISTRATION, "farewell": 20.0, **quick, **more})


@pytest.fixture(autouse=True)
def _registered(server: MisbehavingServer) -> None:
    server.script("/register", Answer(body=b'{"uuid":1}'))
    server.script("/info", Answer(body=b'{"batch_size":2,"max_token_len":128}'))
    server.script("/status", Answer(body=b'{"current_step":0,"queue_size":0}'))


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal.open(tmp_path / "journal") as opened:
        yield opened


@contextmanager
def fetching(journal: Journal, url: str, **options: Any) -> Iterator[FetchingProcess]:
    names = FetcherSettings.model_fields.keys()
    settings = settings_for(url, **{name: options.pop(name) for name in names & options.keys()})
    with FetchingProcess(journal, settings, **{"after": 0, **options}) as fetcher:
        yield fetcher


def test_batches_come_in_order_from_the_journal_with_number_version_and_body(
    server: MisbehavingServer, journal: Journal
) -> None:
    server.script("/batch", NULL, batch(1.0), batch(2.0), NULL)
    version = iter([7] + [8] * 10**6)
    with fetching(journal, server.url, depth=0, served_version=lambda: next(version)) as fetcher:
        one, two = fetcher.get(PATIENCE), fetcher.get(PATIENCE)
        eventually(lambda: fetcher.counters.batches == 2)
        counters = fetcher.counters
    assert [one.number, two.number] == [1, 2]
    assert one.tag in (7, 8)
    assert one.body == batch(1.0).body == journal.read(1).body
    assert two.reply.groups[0].scores == [2.0, 0.0]
    assert (counters.batches, counters.registrations, counters.bytes) == (2, 1, len(one.body) + len(two.body))


def test_a_changed_version_is_recorded_with_what_arrives_after_it(
    server: MisbehavingServer, journal: Journal
) -> None:
    server.script("/batch", batch(1.0), NULL)
    version = 3
    with fetching(journal, server.url, served_version=lambda: version) as fetcher:
        assert fetcher.get(PATIENCE).tag == 3
        version = 4
        eventually(lambda: fetcher._told["version"] == 4)
        server.script("/batch", batch(2.0), NULL)
        assert fetcher.get(PATIENCE).tag == 4


def test_a_registration_after_a_restart_of_the_api_carries_the_current_step(
    server: MisbehavingServer, journal: Journal
) -> None:
    server.script("/batch", batch(1.0), NULL)
    with fetching(journal, server.url, step=lambda: 17) as fetcher:
        fetcher.get(PATIENCE)
        eventually(lambda: fetcher._told.get("step") == 17)
        server.script("/batch", FORGOTTEN, batch(2.0), NULL)
        fetcher.get(PATIENCE)
    sent = [Registration.model_validate_json(s.body) for s in server.seen if s.path == "/register"]
    assert sent[-1].starting_step == 17


def test_a_reply_that_holds_no_batch_is_not_journaled(server: MisbehavingServer, journal: Journal) -> None:
    server.script("/batch", NULL, FORGOTTEN, Answer(body=b'{"batch":[]}'), batch(1.0), NULL)
    with fetching(journal, server.url) as fetcher:
        assert fetcher.get(PATIENCE).number == 1
    assert journal.numbers_after(0) == [1]


def test_a_body_that_cannot_be_read_is_recorded_and_handed_out_marked(
    server: MisbehavingServer, journal: Journal
) -> None:
    server.script("/batch", Answer(body=b'{"batch": ['), batch(1.0), NULL)
    with fetching(journal, server.url) as fetcher:
        bad = fetcher.get(PATIENCE)
        assert fetcher.get(PATIENCE).number == 2
        eventually(lambda: fetcher.counters.unreadable)
        assert (fetcher.counters.unreadable, fetcher.counters.possibly_lost) == (1, 0)
    assert (bad.number, bad.body, bad.reply.groups) == (1, b'{"batch": [', [])
    assert "is no BatchReply: Invalid JSON" in (bad.unreadable or "")
    assert journal.read(1).body == b'{"batch": ['


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


def test_with_depth_0_a_batch_is_prepared_only_when_somebody_waits(
    server: MisbehavingServer, journal: Journal
) -> None:
    journal.append(batch(1.0).body)
    server.script("/batch", NULL)
    prepared: list[BatchReply] = []
    with fetching(journal, server.url, depth=0, prepare=prepared.append) as fetcher:
        eventually(lambda: len(server.paths("/batch")) > 0)
        assert prepared == []
        fetcher.get(PATIENCE)
        assert len(prepared) == 1


def test_the_log_of_a_process_without_a_trainer_does_not_grow_without_bound(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    sender = LogSender(LineWriter(writing), tmp_path / "fetcher.log")
    try:
        for number in range(400):
            sender.emit(logging.makeLogRecord({"msg": f"{number} " + "x" * 10_000}))
    finally:
        os.close(writing)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {"fetcher.log", "fetcher.log.1"}
    assert max(sizes.values()) < (1 << 20) + 20_000
    assert "399 xxx" in (tmp_path / "fetcher.log").read_text()


@pytest.mark.parametrize("depth", [1, 2])
def test_never_more_than_depth_batches_are_fetched_ahead(
    server: MisbehavingServer, journal: Journal, depth: int
) -> None:
    server.script("/batch", *[batch(float(n)) for n in range(10)], NULL)
    with fetching(journal, server.url, depth=depth) as fetcher:
        for taken in range(3):
            eventually(lambda: journal.last_number == depth + taken)  # noqa: B023 - used at once
            time.sleep(0.1)
            assert len(server.paths("/batch")) == depth + taken
            assert fetcher.get(PATIENCE).reply.groups[0].scores[0] == float(taken)


def test_depth_zero_fetches_only_while_somebody_waits(server: MisbehavingServer, journal: Journal) -> None:
    server.script("/batch", NULL, batch(1.0), batch(2.0), NULL)
    with fetching(journal, server.url, depth=0) as fetcher:
        eventually(lambda: server.paths("/batch"))  # the first poll opens the API for environments
        time.sleep(0.1)
        assert len(server.paths("/batch")) == 1
        assert fetcher.get(PATIENCE).number == 1
        time.sleep(0.1)
        assert len(server.paths("/batch")) == 2
        assert fetcher.get(PATIENCE).number == 2


def test_depth_zero_hands_out_a_batch_that_the_first_poll_brought_and_then_fetches_on(
    server: MisbehavingServer, journal: Journal
) -> None:
    server.script("/batch", batch(1.0), batch(2.0), NULL)
    with fetching(journal, server.url, depth=0) as fetcher:
        eventually(lambda: journal.last_number == 1)
        assert [fetcher.get(PATIENCE).number for _ in range(2)] == [1, 2]


def test_what_waits_in_the_journal_comes_first_and_then_what_is_new(
    server: MisbehavingServer, journal: Journal
) -> None:
    for score in range(1, 6):
        journal.append(batch(float(score)).body, served_version=score)
    for number in (1, 2, 3):
        journal.settle(number, "trained", step=number)
    server.script("/batch", NULL)
    with fetching(journal, server.url, after=2) as fetcher:
        batches = [fetcher.get(PATIENCE) for _ in range(3)]
        server.script("/batch", batch(6.0), NULL)
        batches.append(fetcher.get(PATIENCE))
    assert [each.number for each in batches] == [3, 4, 5, 6]
    assert [each.tag for each in batches] == [3, 4, 5, -1]
    assert [entry.outcome for entry in journal.ledger()][:3] == ["trained", "trained", "received"]


# What ends it.


@pytest.mark.parametrize("path", ["/register", "/batch"])
def test_a_refusal_is_raised_as_the_error_that_it_is(
    server: MisbehavingServer, journal: Journal, path: str
) -> None:
    server.script(path, Answer(status=401))
    with fetching(journal, server.url) as fetcher, pytest.raises(AccessDenied) as caught:
        fetcher.get(PATIENCE)
    assert (caught.value.status_code, caught.value.url) == (401, f"{server.url}{path}")


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


def test_a_body_that_nobody_takes_and_no_journal_holds_becomes_a_file(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    """The disk of the journal fails, and the trainer is killed, while a reply is on its way."""
    content = batch(1.0).body
    server.script("/batch", Answer(body=content, drip=1.0 / len(content)), NULL)
    parent = Parent(tmp_path, settings_for(server.url))
    eventually(lambda: server.paths("/batch"), 60)
    blocker = sqlite3.connect(tmp_path / "journal" / "journal.sqlite3", isolation_level=None)
    blocker.execute("CREATE TRIGGER refuse BEFORE INSERT ON batches BEGIN SELECT RAISE(ABORT, 'no'); END")
    blocker.close()
    parent.kill()
    Journal.open(tmp_path / "journal", wait=60).close()
    (path,) = (tmp_path / "journal").glob("unrecorded-*.json")
    assert path.read_bytes() == content
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "is not in the journal" in (tmp_path / "journal" / "fetcher.log").read_text()


def test_errors_keep_class_and_content_on_the_way() -> None:
    for error in (
        BatchNotRecorded("disk full", body=b"\x00\xff"),
        AccessDenied("no", status_code=403, method="GET", url="http://x/batch"),
        JournalFull("no room"),
    ):
        there = error_from_message(json.loads(json.dumps(error_to_message(error))))
        assert type(there) is type(error)
        assert vars(there) == vars(error)
        assert str(there) == str(error)
    strange = error_from_message(error_to_message(ZeroDivisionError("a defect")))
    assert isinstance(strange, FetcherDied)
    assert "ZeroDivisionError: a defect" in str(strange)


def test_a_fetching_process_that_is_killed_is_started_again_and_the_run_goes_on(
    server: MisbehavingServer, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    server.script("/batch", batch(1.0), NULL)
    with fetching(journal, server.url) as fetcher:
        assert fetcher.get(PATIENCE).number == 1
        eventually(lambda: fetcher.counters.empty_replies)
        before = fetcher.counters
        assert fetcher.pid is not None
        os.kill(fetcher.pid, signal.SIGKILL)
        eventually(lambda: "was killed by signal 9 while it was polling" in caplog.text)
        server.script("/batch", batch(2.0), NULL)
        assert fetcher.get(PATIENCE).number == 2
        eventually(lambda: fetcher.counters.batches == 2)  # told after the batch itself
        assert fetcher.counters.polls > before.polls
        assert fetcher.counters.possibly_lost == 1


def test_a_fetching_process_that_keeps_dying_is_given_up_with_its_last_words(
    server: MisbehavingServer, journal: Journal
) -> None:
    server.script("/batch", NULL)
    settings = settings_for(server.url, ca_file=Path("/does/not/exist.pem"))
    with (
        FetchingProcess(journal, settings, after=0, max_restarts=1) as fetcher,
        pytest.raises(FetcherDied, match=r"exit code 1, 2 times(.|\n)*No such file"),
    ):
        fetcher.get(PATIENCE)


def test_waiting_in_vain_says_who_is_late(server: MisbehavingServer, journal: Journal) -> None:
    server.script("/batch", NULL)
    with fetching(journal, server.url) as fetcher:
        eventually(lambda: fetcher.counters.empty_replies)
        with pytest.raises(BatchTimeout, match=r"no batch within 0\.1 s: no environment connected"):
            fetcher.get(0.1)


def test_its_log_lines_are_ours(
    server: MisbehavingServer, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    server.script("/batch", NULL)
    server.script("/info", Answer(body=b'{"batch_size":512,"max_token_len":9}'))
    with fetching(journal, server.url):
        eventually(lambda: "keeps an earlier registration" in caplog.text)
    record = next(r for r in caplog.records if "keeps an earlier registration" in r.getMessage())
    assert (record.name, record.levelno) == ("atropos_client._poller", logging.WARNING)


def test_credentials_are_sent_and_never_stand_on_a_command_line(
    server: MisbehavingServer, journal: Journal
) -> None:
    server.script("/batch", NULL)
    credentials = {"token": "abc-secret", "headers": {"X-Key": "def-secret"}}
    with fetching(journal, server.url, **credentials) as fetcher:
        eventually(lambda: server.paths("/batch"))
        command = Path(f"/proc/{fetcher.pid}/cmdline").read_bytes()
        environment = Path(f"/proc/{fetcher.pid}/environ").read_bytes()
    assert b"secret" not in command + environment
    assert server.seen[0].headers["authorization"] == "Bearer abc-secret"
    assert server.seen[0].headers["x-key"] == "def-secret"


def test_stopping_ends_the_process_and_leaves_what_nobody_took_in_the_journal(
    server: MisbehavingServer, journal: Journal
) -> None:
    server.script("/batch", batch(1.0), NULL)
    with fetching(journal, server.url) as fetcher:
        eventually(lambda: journal.last_number == 1)
        pid = fetcher.pid
        assert fetcher.stop(PATIENCE) == fetcher.stop() == []
        assert not Path(f"/proc/{pid}").exists()
        assert not [t.name for t in threading.enumerate() if t.name in ("atropos-fetcher", "atropos-loader")]
    assert journal.entry(1).outcome == "received"
    with pytest.raises(PollerStopped):
        fetcher.get()


def test_a_poll_that_is_under_way_when_the_trainer_stops_is_recorded_all_the_same(
    server: MisbehavingServer, journal: Journal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.script("/batch", Answer(body=batch(1.0).body, drip=0.01), NULL)
    with fetching(journal, server.url) as fetcher:
        eventually(lambda: server.paths("/batch"))
        fetcher.stop(timeout=0.05)
        assert "A poll is still under way" in caplog.text
    journal.close()
    with Journal.open(tmp_path / "journal", wait=30) as after:
        assert [after.read(number).body for number in after.numbers_after(0)] == [batch(1.0).body]


def test_wrong_use_is_refused(server: MisbehavingServer, journal: Journal) -> None:
    settings = settings_for(server.url)
    with pytest.raises(ValueError, match="depth"):
        FetchingProcess(journal, settings, after=0, depth=-1)
    with (
        Journal.read_only(journal.directory) as reader,
        pytest.raises(ValueError, match="reading only"),
    ):
        FetchingProcess(reader, settings, after=0)
    fetcher = FetchingProcess(journal, settings, after=0)
    with pytest.raises(PollerStopped, match="not started"):
        fetcher.get(1)
    assert fetcher.stop() == []


# The trainer is killed.


class Parent:
    """A trainer's intake in a process of its own; see `fetching_parent`."""

    def __init__(self, directory: Path, settings: FetcherSettings, *, train_seconds: float = 0.0) -> None:
        told = {
            "journal": str(directory / "journal"),
            "checkpoint": str(directory / "checkpoint"),
            "settings": settings.model_dump(mode="json"),
            "train_seconds": train_seconds,
        }
        command = [sys.executable, "-m", "tests.atropos_client.fetching_parent", json.dumps(told)]
        self.process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)

    def kill(self, *, group: bool = True) -> None:
        """SIGKILL, to the whole process group as a terminal or a job manager would."""
        if group:
            os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self.process.kill()
        self.process.wait()


@pytest.mark.parametrize("group", [False, True], ids=["the trainer", "its process group"])
def test_a_batch_that_is_on_its_way_when_the_trainer_is_killed_is_recorded(
    server: MisbehavingServer, tmp_path: Path, group: bool
) -> None:
    content = batch(1.0).body
    server.script("/batch", Answer(body=content, drip=1.0 / len(content)), NULL)
    parent = Parent(tmp_path, settings_for(server.url))
    eventually(lambda: server.paths("/batch"), 60)
    parent.kill(group=group)
    with Journal.open(tmp_path / "journal", wait=60) as journal:
        assert [journal.read(number).body for number in journal.numbers_after(0)] == [content]
    log = (tmp_path / "journal" / "fetcher.log").read_text()
    assert "Recorded batch 1 after the trainer was gone." in log


def test_the_fetching_process_ends_soon_after_an_idle_trainer_is_killed(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    server.script("/batch", NULL)
    parent = Parent(tmp_path, settings_for(server.url))
    eventually(lambda: len(server.paths("/batch")) > 2, 60)
    parent.kill()
    Journal.open(tmp_path / "journal", wait=10).close()


def test_an_api_that_hangs_does_not_keep_the_process_longer_than_its_farewell(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    server.script("/batch", Answer(body=b'{"batch":null}', delay=600.0))
    timeouts = Timeouts(batch_read=600.0)
    parent = Parent(tmp_path, settings_for(server.url, farewell=1.0, timeouts=timeouts))
    eventually(lambda: server.paths("/batch"), 60)
    parent.kill()
    killed = time.monotonic()
    Journal.open(tmp_path / "journal", wait=60).close()
    assert time.monotonic() - killed < 30


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kills", [30])
def test_after_kills_at_random_moments_every_sequence_is_there_once_and_in_order(
    tmp_path: Path, kills: int
) -> None:
    """Against the real API. The environment pushes while trainers come and go."""
    generator = random.Random(kills)
    registration = Registration(batch_size=4, max_token_len=1 << 16, num_steps=10_000)
    with RealApi() as api, AtroposClient(api.url) as client:
        settings = settings_for(api.url, registration=registration)
        environment = NumberedBatches(api.url)
        for _ in range(kills):
            parent = Parent(tmp_path, settings, train_seconds=0.02)
            # While it starts, or around the time of a batch, where it matters.
            environment.wait_for_more(generator.choice([0, 1, 1, 2, 3]))
            time.sleep(generator.uniform(0.0, 0.1))
            parent.kill(group=generator.random() < 0.5)
        parent = Parent(tmp_path, settings)
        pushed = environment.finish()
        eventually(lambda: client.status().queue_size == 0, 60)
        parent.kill()
        # The API lives until the last poll is answered.
        Journal.open(tmp_path / "journal", wait=60).close()
    checkpoint = int((tmp_path / "checkpoint").read_text())
    with Journal.open(tmp_path / "journal", wait=60) as journal:
        journal.rewind(checkpoint)
        numbers = journal.numbers_after(0)
        batches = [BatchReply.model_validate_json(journal.read(number).body) for number in numbers]
        outcomes = [entry.outcome for entry in journal.ledger()]
        assert journal.verify().problems == ()
    assert [[each.tokens[0][0] for each in reply.groups] for reply in batches] == [[n, n] for n in pushed]
    assert numbers == list(range(1, len(numbers) + 1))
    assert outcomes == ["trained"] * checkpoint + ["received"] * (len(numbers) - checkpoint)
    assert len(pushed) > kills


class NumberedBatches:
    """An environment that pushes whole batches, one when the one before is gone: their order is then certain.

    The API serves batches newest first if it holds several.
    """

    def __init__(self, url: str) -> None:
        self._client = AtroposClient(url)
        self._pushed: list[int] = []
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._push, daemon=True)
        self._thread.start()

    def queued(self) -> bool:
        return self._client.status().queue_size > 0

    def wait_for_more(self, batches: int) -> None:
        wanted = len(self._pushed) + batches
        eventually(lambda: len(self._pushed) >= wanted, PATIENCE)

    def finish(self) -> list[int]:
        self._finished.set()
        self._thread.join(PATIENCE)
        self._client.close()
        return self._pushed

    def _push(self) -> None:
        # Groups pushed before a trainer has registered would keep this API from ever taking one.
        while not self._client.info().registered:
            time.sleep(0.01)
        while not self._finished.is_set():
            if self.queued():
                time.sleep(0.005)
                continue
            number = len(self._pushed) + 1
            # Large enough for a reply to take a while.
            self._client.push_groups([group(number, length=5_000)] * 2)
            self._pushed.append(number)


def test_a_process_that_is_stopped_is_named_in_the_log(
    server: MisbehavingServer, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    server.script("/batch", NULL)
    with fetching(journal, server.url, heartbeat=0.5) as fetcher:
        eventually(lambda: fetcher.counters.polls > 0)
        pid = fetcher.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            waiting = threading.Thread(target=fetcher.get, args=(PATIENCE,))
            waiting.start()
            said = (
                f"no batch: the Atropos API, or process {pid} that fetches from it, has not answered for 3 s"
            )
            eventually(lambda: said in caplog.text)
        finally:
            os.kill(pid, signal.SIGCONT)
        server.script("/batch", batch(1.0))
        waiting.join(PATIENCE)


def test_a_wait_for_the_preparation_of_a_batch_is_not_blamed_on_the_api(
    server: MisbehavingServer, journal: Journal
) -> None:
    server.script("/batch", batch(1.0), NULL)
    release = threading.Event()

    def prepare(_: BatchReply) -> None:
        release.wait(PATIENCE)

    with fetching(journal, server.url, prepare=prepare) as fetcher:
        eventually(lambda: "batch 1 is recorded, and being read and prepared" in fetcher.explain_wait())
        release.set()
        assert fetcher.get(PATIENCE).number == 1

"""The fetching process: no end of the trainer costs a batch, and none of its own is kept quiet."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from atropos_client import (
    AccessDenied,
    FetcherDied,
    JournalFull,
    Timeouts,
)
from atropos_client.fetcher import Fetcher, FetcherSettings
from atropos_client.fetcher._last_words import read_last_words, write_last_words
from atropos_client.journal import Journal
from tests.atropos_client.misbehaving_server import Answer, MisbehavingServer, eventually
from tests.atropos_client.test_fetcher import (
    NULL,
    PATIENCE,
    batch,
    fetching,
    settings_for,
)

ROOT = Path(__file__).parent.parent.parent

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("registered")]


def test_a_process_fetches_with_credentials_that_stand_on_no_command_line_and_logs_where_we_do(
    server: MisbehavingServer, journal: Journal, capfd: pytest.CaptureFixture[str]
) -> None:
    server.script("/batch", NULL, batch(1.0), NULL)
    server.script("/info", Answer(body=b'{"batch_size":512,"max_token_len":9}'))
    credentials = {"token": "abc-secret", "headers": {"X-Key": "def-secret"}}
    with ExitStack() as stack:
        for _ in range(1030):  # select() knows no more
            stack.enter_context(Path(os.devnull).open())
        started = fetching(journal, server.url, Fetcher, served_version=lambda: 7, **credentials)
        fetcher = stack.enter_context(started)
        taken = fetcher.get(PATIENCE)
        assert (taken.number, taken.served_version, taken.body) == (1, 7, batch(1.0).body)
        command = Path(f"/proc/{fetcher.pid}/cmdline").read_bytes()
        environment = Path(f"/proc/{fetcher.pid}/environ").read_bytes()
        pid = fetcher.pid
        fetcher.stop(PATIENCE)
        assert not Path(f"/proc/{pid}").exists()
    assert b"secret" not in command + environment
    assert server.seen[0].headers["authorization"] == "Bearer abc-secret"
    assert server.seen[0].headers["x-key"] == "def-secret"
    (line,) = [
        line for line in capfd.readouterr().err.splitlines() if "keeps an earlier registration" in line
    ]
    assert line[19:].startswith(" WARNING The Atropos API keeps"), line


def test_a_refusal_is_raised_as_the_error_that_it_is(server: MisbehavingServer, journal: Journal) -> None:
    server.script("/register", Answer(status=401))
    with fetching(journal, server.url, Fetcher) as fetcher, pytest.raises(AccessDenied) as caught:
        fetcher.get(PATIENCE)
    assert (caught.value.status_code, caught.value.url) == (401, f"{server.url}/register")


def test_errors_keep_class_and_content_on_the_way() -> None:
    for error in (
        AccessDenied("no", status_code=403, method="GET", url="http://x/batch"),
        JournalFull("no room"),
    ):
        there = read_last_words(write_last_words(error))
        assert type(there) is type(error)
        assert vars(there) == vars(error)
        assert str(there) == str(error)
    strange = read_last_words(write_last_words(ZeroDivisionError("a defect")))
    assert isinstance(strange, FetcherDied)
    assert "ZeroDivisionError: a defect" in str(strange)


def test_a_process_that_is_killed_is_started_again_and_the_run_goes_on(
    server: MisbehavingServer, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    server.script("/batch", batch(1.0), NULL)
    with fetching(journal, server.url, Fetcher) as fetcher:
        assert fetcher.get(PATIENCE).number == 1
        eventually(lambda: fetcher.counters.empty_replies)
        server.script("/batch", Answer(body=b'{"batch":null}', delay=600.0))
        polled = len(server.paths("/batch"))
        eventually(lambda: len(server.paths("/batch")) > polled)  # the one that hangs
        before = fetcher.counters
        assert fetcher.pid is not None
        os.kill(fetcher.pid, signal.SIGKILL)
        eventually(lambda: "was killed by signal 9 while it was polling" in caplog.text)
        server.script("/batch", batch(2.0), NULL)
        assert fetcher.get(PATIENCE).number == 2
        assert fetcher.counters.batches == 2
        assert fetcher.counters.polls > before.polls
        assert fetcher.counters.possibly_lost == 1


def test_a_process_that_is_killed_again_and_again_is_given_up(
    server: MisbehavingServer, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atropos_client.fetcher._process._MOST_RESTARTS", 0)
    server.script("/batch", NULL)
    with fetching(journal, server.url, Fetcher) as fetcher:
        eventually(lambda: fetcher.counters.empty_replies)
        assert fetcher.pid is not None
        os.kill(fetcher.pid, signal.SIGKILL)
        with pytest.raises(FetcherDied, match=r"was killed by signal 9.*, 1 times without a batch"):
            fetcher.get(PATIENCE)


def test_a_process_that_cannot_work_says_why_without_a_traceback(
    server: MisbehavingServer, journal: Journal, capfd: pytest.CaptureFixture[str]
) -> None:
    with (
        fetching(journal, server.url, Fetcher, ca_file=Path("/does/not/exist.pem")) as fetcher,
        pytest.raises(FetcherDied, match=r"FileNotFoundError: .*No such file"),
    ):
        fetcher.get(PATIENCE)
    assert "Traceback" not in capfd.readouterr().err


def test_a_process_that_is_stopped_is_named_in_the_log(
    server: MisbehavingServer, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    server.script("/batch", NULL)
    with fetching(journal, server.url, Fetcher, heartbeat=0.5) as fetcher:
        eventually(lambda: fetcher.counters.polls > 0)
        pid = fetcher.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            eventually(lambda: f"no batch: process {pid}, which fetches, has not moved for" in caplog.text)
        finally:
            os.kill(pid, signal.SIGCONT)
        server.script("/batch", batch(1.0))
        assert fetcher.get(PATIENCE).number == 1


def test_a_poll_that_is_under_way_when_the_trainer_stops_is_recorded_all_the_same(
    server: MisbehavingServer, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    server.script("/batch", Answer(body=batch(1.0).body, drip=0.01), NULL)
    with fetching(journal, server.url, Fetcher) as fetcher:
        eventually(lambda: server.paths("/batch"))
        fetcher.stop(timeout=0.05)
        assert "A poll is still under way" in caplog.text
    journal.close()
    with Journal.open(journal.directory, wait=30) as after:
        assert [after.read(number).body for number in after.numbers_after(0)] == [batch(1.0).body]


# The trainer is killed.


class Parent:
    """A trainer's intake in a process of its own; see `fetching_parent`."""

    def __init__(self, directory: Path, settings: FetcherSettings, *, stderr: int | None = None) -> None:
        words = [str(directory / "journal"), settings.model_dump_json()]
        command = [sys.executable, "-m", "tests.atropos_client.fetching_parent", *words]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=stderr, start_new_session=True)

    def kill(self, *, group: bool = True) -> None:
        """SIGKILL, to the whole process group as a terminal or a job manager would."""
        if group:
            os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self.process.kill()
        self.process.wait()


@pytest.mark.parametrize("group", [False, True], ids=["the trainer", "its process group"])
def test_a_batch_that_is_on_its_way_when_the_trainer_is_killed_is_recorded(
    server: MisbehavingServer, tmp_path: Path, group: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    content = batch(1.0).body
    server.script("/batch", Answer(body=content, drip=1.0 / len(content)), NULL)
    parent = Parent(tmp_path, settings_for(server.url))
    eventually(lambda: server.paths("/batch"), 60)
    parent.kill(group=group)
    with Journal.open(tmp_path / "journal", wait=60) as journal:
        assert [journal.read(number).body for number in journal.numbers_after(0)] == [content]
    assert "Recorded batch 1, which was on its way when the trainer ended." in capfd.readouterr().err


def test_a_body_that_the_journal_does_not_take_is_taken_in_by_the_next_start(
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
    eventually(lambda: list((tmp_path / "journal").glob("unrecorded-*.json")), 60)
    blocker = sqlite3.connect(tmp_path / "journal" / "journal.sqlite3", isolation_level=None)
    blocker.execute("DROP TRIGGER refuse")
    blocker.close()
    with Journal.open(tmp_path / "journal", wait=60) as journal:
        assert journal.read(1).body == content


def test_the_fetching_process_ends_soon_after_an_idle_trainer_is_killed(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    server.script("/batch", NULL)
    parent = Parent(tmp_path, settings_for(server.url))
    eventually(lambda: len(server.paths("/batch")) > 2, 60)
    parent.kill()
    Journal.open(tmp_path / "journal", wait=10).close()


def test_an_api_that_hangs_and_a_log_that_nobody_reads_keep_no_process_longer_than_its_farewell(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    server.script("/batch", Answer(body=b'{"batch":null}', delay=600.0))
    timeouts = Timeouts(batch_read=600.0)
    reading, full = os.pipe()
    parent = Parent(tmp_path, settings_for(server.url, farewell=1.0, timeouts=timeouts), stderr=full)
    eventually(lambda: server.paths("/batch"), 60)
    os.set_blocking(full, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(full, b"x" * 65536)
    os.set_blocking(full, True)
    parent.kill()
    killed = time.monotonic()
    with Journal.open(tmp_path / "journal", wait=60) as journal:
        assert journal.possibly_lost == 1
    assert time.monotonic() - killed < 30
    os.close(reading)
    os.close(full)

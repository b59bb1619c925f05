"""The journal after a crash: what stays whole, what is noticed, and what the next start takes in."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import stat
from pathlib import Path

import pytest

from atropos_client import (
    BatchNotRecorded,
    JournalDamaged,
    JournalError,
    JournalLocked,
    JournalNotWritten,
    NoSuchBatch,
)
from atropos_client.journal import Journal, export_batches
from tests.atropos_client.journals import body, start_program


def test_after_a_kill_in_the_middle_of_writing_whole_batches_stay_and_a_line_says_so(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program = """
        journal = Journal.open(directory)
        journal._connection.execute("PRAGMA cache_size=10")  # so that an unfinished write reaches the log
        journal.append(b"whole")
        journal._connection.execute("BEGIN")
        journal._connection.execute("INSERT INTO bodies VALUES (99, ?)", (os.urandom(2_000_000),))
        os.kill(os.getpid(), 9)
    """
    assert start_program(program, directory).wait() == -signal.SIGKILL
    with Journal.open(directory) as journal:
        assert journal.read(1).body == b"whole"
        assert journal.last_number == 1
        assert journal.verify().problems == ()
    lines = [record.getMessage() for record in caplog.records if "not closed in order" in record.getMessage()]
    assert len(lines) == 1
    caplog.clear()
    Journal.open(directory).close()
    assert "not closed in order" not in caplog.text


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_a_log_torn_by_a_power_cut_loses_the_torn_batch_and_nothing_before_it(
    directory: Path, tmp_path: Path, keep: float
) -> None:
    torn = tmp_path / "torn"
    torn.mkdir()
    with Journal.open(directory) as journal:
        journal.append(body(1))
        size_before = (directory / "journal.sqlite3-wal").stat().st_size
        journal.append(os.urandom(100_000))
        log = (directory / "journal.sqlite3-wal").read_bytes()
        database = (directory / "journal.sqlite3").read_bytes()
    cut = size_before + int(keep * (len(log) - size_before))
    (torn / "journal.sqlite3").write_bytes(database)
    (torn / "journal.sqlite3-wal").write_bytes(log[:cut])
    with Journal.open(torn) as journal:
        assert journal.numbers_after(0) == [1]
        assert journal.read(1).body == body(1)
        assert journal.append(body(3)) == 2


@pytest.mark.parametrize("offset", [0, 5000], ids=["a link between pages", "the content of a page"])
def test_a_body_that_was_changed_on_the_disk_is_named(directory: Path, offset: int) -> None:
    with Journal.open(directory) as journal:
        journal.append(os.urandom(200_000))
        journal.append(body(2))
    file = directory / "journal.sqlite3"
    content = bytearray(file.read_bytes())
    content[10 * 16384 + offset] ^= 1  # among the pages of the first body
    file.write_bytes(content)
    with Journal.open(directory) as journal:
        with pytest.raises(
            JournalDamaged, match=r"journal\.sqlite3 is damaged: the body of batch 1\b.*export"
        ):
            journal.read(1)
        assert journal.read(2).body == body(2)
        problems = journal.verify().problems
        assert any("the body of batch 1" in problem for problem in problems)
        assert not any("batch 2" in problem for problem in problems)
        lines = [json.loads(line) for line in export_batches(journal, journal.numbers_after(0))]
    assert "batch 1" in lines[0]["damaged"]
    assert lines[1]["reply"] == json.loads(body(2))


def test_a_file_that_is_no_journal_is_refused(directory: Path) -> None:
    directory.mkdir(parents=True)
    (directory / "journal.sqlite3").write_bytes(os.urandom(50_000))
    with pytest.raises(JournalDamaged, match=r"not a database.*move the directory away"):
        Journal.open(directory)
    with pytest.raises(JournalDamaged):
        Journal.read_only(directory)


def test_a_damaged_ledger_is_found_when_it_is_opened(directory: Path) -> None:
    with Journal.open(directory) as journal:
        for seed in range(3):
            journal.append(body(seed))
    file = directory / "journal.sqlite3"
    content = bytearray(file.read_bytes())
    content[16384 : 2 * 16384] = bytes(16384)  # the first page after the schema: the root of `batches`
    file.write_bytes(content)
    with pytest.raises(JournalDamaged):
        Journal.open(directory)


CHANGES = {
    "an outcome": "UPDATE batches SET outcome = 'trained', step = 9 WHERE number = 2",
    "a version": "UPDATE batches SET served_version = 5 WHERE number = 1",
    "a missing row": "DELETE FROM batches WHERE number = 2",
    "a missing last row": "DELETE FROM batches WHERE number = 3",
    "no row left": "DELETE FROM batches",
    "the next number": "UPDATE sqlite_sequence SET seq = 7",
    "the beginning": "UPDATE state SET begin = 1",
    "the tables": "ALTER TABLE batches ADD COLUMN more",
    "no text": "UPDATE batches SET reason = CAST(x'ff' AS TEXT) WHERE number = 3",
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_ledger_that_is_not_what_was_written_is_noticed(directory: Path, change: str) -> None:
    with Journal.open(directory) as journal:
        for seed in range(3):
            journal.append(body(seed))
        journal.settle(1, "trained", step=1)
    with sqlite3.connect(directory / "journal.sqlite3") as connection:
        connection.execute(change)
    connection.close()
    with Journal.read_only(directory) as journal:
        assert journal.verify().problems
    with pytest.raises(JournalDamaged, match=r"journal verify .* lists what is"):
        Journal.open(directory, accept_loss=True)


# What a killed run leaves.

KILLED = """
    journal = Journal.open(directory)
    for number in range(1, 6):
        journal.append(os.urandom(40_000))
        journal.settle(number, "trained", step=number)
    journal.append(os.urandom(40_000))
    os.kill(os.getpid(), 9)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("killed") / "journal"
    assert start_program(KILLED, directory).wait() == -signal.SIGKILL
    return directory


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.6, 0.99])
def test_a_bit_that_flips_in_the_log_of_a_killed_run_stops_the_next_start(
    killed: Path, tmp_path: Path, share: float
) -> None:
    shutil.copytree(killed, tmp_path / "journal")
    log = tmp_path / "journal/journal.sqlite3-wal"
    content = bytearray(log.read_bytes())
    content[int(share * (len(content) - 1))] ^= 4
    log.write_bytes(content)
    if share < 0.01:  # nothing of it can be used
        with pytest.raises(JournalError, match="was emptied, or its log is damaged"):
            Journal.read_only(tmp_path / "journal")
    else:
        with Journal.read_only(tmp_path / "journal") as journal:
            assert "writes are missing" in journal.verify().problems[-1]
    for _ in range(2):  # the first start changes nothing: the second finds the same
        with pytest.raises(JournalDamaged, match=r"lacks the last \d+ of 11 writes .*accept_loss true"):
            Journal.open(tmp_path / "journal")
        assert log.read_bytes() == content
    with Journal.open(tmp_path / "journal", accept_loss=True) as journal:
        assert journal.append(b"{}") <= 6
    with Journal.open(tmp_path / "journal") as journal:
        assert journal.verify().problems == ()


@pytest.mark.parametrize("name", ["journal.sqlite3", "journal.sqlite3-wal"])
@pytest.mark.parametrize("how", ["emptied", "deleted"])
def test_an_emptied_or_deleted_file_of_a_killed_run_stops_the_next_start(
    killed: Path, tmp_path: Path, name: str, how: str
) -> None:
    shutil.copytree(killed, tmp_path / "journal")
    (tmp_path / "journal" / name).unlink()
    if how == "emptied":
        (tmp_path / "journal" / name).touch()
    with pytest.raises(JournalDamaged, match=r"lacks the last 11 of 11 writes"):
        Journal.open(tmp_path / "journal")
    with Journal.open(tmp_path / "journal", accept_loss=True) as journal:
        assert journal.append(b"{}") == 1


def test_a_batch_that_ends_the_process_twice_while_it_is_read_is_skipped(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Journal.open(directory) as journal:
        for seed in range(3):
            journal.append(body(seed))
    for number in (1, 2, 1, 2, 2, 3):  # of 2 two in a row
        journal = Journal.open(directory)
        with journal.in_hand(3):
            pass  # does no harm
        journal.marks.hold(number)  # as it stands when the process is killed
        journal.close()
    with Journal.open(directory) as journal:
        assert [entry.skip_reason is not None for entry in journal.ledger()] == [False, True, False]
        journal.settle(1, "trained", step=1)
        journal.settle(2, "set_aside", reason="x")
        journal.rewind(0)
        assert journal.entry(2).skip_reason == "the trainer ended 2 times while it read this batch"
        assert journal.verify().problems == ()
        with pytest.raises(JournalError, match=f"journal skip {directory} 3"), journal.in_hand(3):
            raise MemoryError
        with pytest.raises(NoSuchBatch):
            journal.skip(4, "x")
    assert caplog.text.count("will be set aside unread") == 1


def test_a_poll_that_was_under_way_when_all_processes_ended_is_counted_once(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for under_way, counted in ((False, 0), (True, 0), (True, 1), (False, 1), (False, 0)):
        with Journal.open(directory) as journal:
            assert journal.possibly_lost == counted
            journal.marks.set("polling_since", int(under_way))
    assert caplog.text.count("so that a batch is possibly lost") == 2


def test_a_body_that_a_locked_database_does_not_take_is_taken_in_by_the_next_start(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atropos_client.journal._database._BUSY_SECONDS", 0.1)
    with Journal.open(directory) as journal:
        journal.append(body(1))
        other = sqlite3.connect(directory / "journal.sqlite3", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(BatchNotRecorded, match=r"locked .* is kept as .*, and the next start") as caught:
            journal.append(body(2), served_version=7)
        other.close()
    assert isinstance(caught.value.__cause__, JournalLocked)
    (kept,) = directory.glob("unrecorded-*")
    assert str(kept) in str(caught.value)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    content = kept.read_bytes()
    kept.write_bytes(content[:-1])
    with pytest.raises(JournalDamaged, match=r"unrecorded-.* is not what was written; move it away"):
        Journal.open(directory)
    kept.write_bytes(content)
    for _ in range(2):  # a start that died before it deleted the file
        with Journal.open(directory) as journal:
            assert journal.numbers_after(0) == [1, 2]
            taken = journal.read(2)
            assert (taken.body, taken.entry.served_version) == (body(2), 7)
        assert not kept.exists()
        kept.write_bytes(content)


@pytest.mark.parametrize("name", ["lock", "journal.marks", "journal.sqlite3", "journal.sqlite3-wal"])
def test_a_link_in_the_directory_is_refused(directory: Path, tmp_path: Path, name: str) -> None:
    directory.mkdir(parents=True)
    (directory / name).symlink_to(tmp_path / "victim")
    with pytest.raises(JournalNotWritten, match=f"{name} is a symbolic link"):
        Journal.open(directory)
    assert not (tmp_path / "victim").exists()


def test_a_format_of_a_later_version_is_refused(directory: Path) -> None:
    Journal.open(directory).close()
    with sqlite3.connect(directory / "journal.sqlite3") as connection:
        connection.execute("PRAGMA user_version=3")
    connection.close()
    with pytest.raises(JournalError, match="has format 3; this version reads format 2"):
        Journal.open(directory)


def test_looking_at_a_journal_that_is_not_there_makes_none(directory: Path) -> None:
    with pytest.raises(JournalError, match="there is no journal in"):
        Journal.read_only(directory)
    assert not directory.exists()

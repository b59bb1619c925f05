"""The journal of batches: what is durable, what is undone, what is refused, and what a crash leaves."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from atropos_client import (
    BatchNotRecorded,
    JournalDamaged,
    JournalError,
    JournalFull,
    JournalLocked,
    JournalMismatch,
    JournalNotWritten,
    NoSuchBatch,
)
from atropos_client.journal import Journal, JournalLimits, export_batches
from tests.atropos_client.misbehaving_server import eventually

ROOT = Path(__file__).parent.parent.parent


def body(seed: int, size: int = 200) -> bytes:
    generator = random.Random(seed)
    return json.dumps({"batch": [{"tokens": [[generator.random() for _ in range(size // 20)]]}]}).encode()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "output" / "journal"


@pytest.fixture
def journal(directory: Path) -> Iterator[Journal]:
    with Journal.open(directory) as opened:
        yield opened


def outcomes(journal: Journal) -> list[str]:
    return [entry.outcome for entry in journal.ledger()]


def test_a_body_comes_back_byte_for_byte_with_all_that_was_noted(journal: Journal) -> None:
    assert journal.append(b'{"batch": [ \xff not JSON', served_version=7) == 1
    assert journal.append(body(2)) == 2
    first, second = journal.read(1), journal.read(2)
    assert first.body == b'{"batch": [ \xff not JSON'
    assert (first.entry.served_version, second.entry.served_version) == (7, -1)
    assert first.entry.received_at <= second.entry.received_at
    assert second.entry.size == len(body(2))
    assert journal.numbers_after(0) == [1, 2]
    assert journal.numbers_after(1) == [2]
    assert journal.last_number == 2


def test_everything_is_there_after_it_was_opened_again_and_no_number_is_used_twice(directory: Path) -> None:
    with Journal.open(directory) as journal:
        journal.append(body(1))
        journal.append(body(2))
        for number in (1, 2):
            journal.settle(number, "trained", step=number)
        journal.prune(2)
    with Journal.open(directory) as journal:
        assert [(entry.outcome, entry.step) for entry in journal.ledger()] == [("trained", 1), ("trained", 2)]
        assert journal.append(body(3)) == 3
    with Journal.open(directory) as journal:
        assert journal.read(3).body == body(3)


def test_a_batch_gets_one_outcome(journal: Journal) -> None:
    journal.append(body(1))
    journal.settle(1, "set_aside", reason="no advantage differs from 0")
    with pytest.raises(JournalMismatch, match="batch 1 is set_aside already and cannot become trained too"):
        journal.settle(1, "trained", step=3)
    with pytest.raises(JournalMismatch, match="received"):
        journal.settle(1, "received")
    with pytest.raises(NoSuchBatch, match="no batch 9"):
        journal.settle(9, "trained", step=1)
    assert journal.entry(1).reason == "no advantage differs from 0"


def test_a_rewind_undoes_the_outcomes_that_the_checkpoint_does_not_count(journal: Journal) -> None:
    for seed in range(5):
        journal.append(body(seed))
    for number in (1, 2, 4):
        journal.settle(number, "trained", step=number)
    journal.settle(3, "skipped", reason="why not")
    report = journal.rewind(2)
    assert (report.waiting, report.undone) == (3, 2)
    assert outcomes(journal) == ["trained", "trained", "received", "received", "received"]
    assert journal.entry(3).reason is None
    assert journal.numbers_after(2) == [3, 4, 5]


def test_a_rewind_to_a_batch_that_the_journal_never_had_is_refused(journal: Journal) -> None:
    journal.append(body(1))
    with pytest.raises(JournalMismatch, match=r"counts 2 batches but the journal .* ends with batch 1"):
        journal.rewind(2)


def test_a_journal_that_begins_in_the_middle_of_a_run_is_refused_without_a_switch_and_numbers_on_with_it(
    directory: Path,
) -> None:
    refused = pytest.raises(JournalMismatch, match=r"counts 40 .* is new or emptied.*accept_loss true")
    Journal.require_usable(directory, after=0)
    Journal.require_usable(directory, after=40, accept_loss=True)
    with refused:
        Journal.require_usable(directory, after=40)
    assert not directory.exists()
    with Journal.open(directory) as journal, refused:
        journal.rewind(40)
    with Journal.open(directory, accept_loss=True) as journal:
        assert journal.rewind(40).waiting == 0
    with Journal.open(directory) as journal:  # it has begun
        assert journal.rewind(40).waiting == 0
        assert journal.append(body(1)) == 41
        assert journal.rewind(40).waiting == 1
        assert journal.verify().problems == ()


def test_a_count_without_an_outcome_is_reported(journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    journal.append(body(1))
    journal.rewind(1)
    assert "1 batch up to batch 1, which the checkpoint counts, without an outcome" in caplog.text


def test_pruning_deletes_settled_bodies_and_keeps_the_ledger(journal: Journal) -> None:
    for seed in range(4):
        journal.append(body(seed))
    for number in (1, 3):
        journal.settle(number, "trained", step=number)
    assert journal.prune(3) == 2
    assert outcomes(journal) == ["trained", "received", "trained", "received"]
    assert journal.entry(1).stored_size is None
    assert journal.read(2).body == body(1)
    with pytest.raises(NoSuchBatch, match=r"the body of batch 1 \(trained\) was pruned"):
        journal.read(1)
    with pytest.raises(JournalMismatch, match=r"no body of batch 1 any more.* Put back the checkpoints"):
        journal.rewind(0)
    Journal.require_usable(journal.directory, after=3)
    with pytest.raises(JournalMismatch, match=r"no body of batch 1 any more.* Put back the checkpoints"):
        Journal.require_usable(journal.directory, after=0)
    assert journal.rewind(3).waiting == 1
    assert journal.verify().problems == ()


def test_the_space_of_pruned_bodies_is_used_again(journal: Journal, directory: Path) -> None:
    def round_of(count: int) -> int:
        for _ in range(count):
            number = journal.append(os.urandom(300_000))
            journal.settle(number, "trained", step=number)
            journal.prune(number - 2)
        return (directory / "journal.sqlite3").stat().st_size

    early = round_of(60)
    assert round_of(60) <= early + 600_000


def test_every_write_is_flushed_to_the_disk_before_it_returns(journal: Journal) -> None:
    settings = {
        name: journal._connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "fullfsync", "checkpoint_fullfsync")
    }
    assert settings == {"journal_mode": "wal", "synchronous": 2, "fullfsync": 1, "checkpoint_fullfsync": 1}


def test_a_second_writer_is_refused_and_told_who_holds_it(journal: Journal, directory: Path) -> None:
    with pytest.raises(JournalLocked, match=f"being written by process {os.getpid()}"):
        Journal.open(directory)
    with pytest.raises(JournalLocked, match=r"still after 0\.1 s"):
        Journal.open(directory, wait=0.1)


def test_a_lock_that_is_shared_is_free_when_all_have_let_go(directory: Path) -> None:
    lock = Journal.take_lock(directory)
    with Journal.open(directory, lock=lock.share()):
        lock.release()
        lock.release()
        with pytest.raises(JournalLocked):
            Journal.take_lock(directory)
    Journal.take_lock(directory).release()


def test_a_writer_waits_for_the_one_before_to_end(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first = Journal.open(directory)

    def end_the_first() -> None:
        eventually(lambda: "Waiting up to 30 s for process" in caplog.text)
        first.close()

    thread = threading.Thread(target=end_the_first)
    thread.start()
    with Journal.open(directory, wait=30) as second:
        assert second.append(body(1)) == 1
    thread.join()


def test_it_can_be_read_while_another_writes(journal: Journal, directory: Path) -> None:
    journal.append(body(1))
    with Journal.read_only(directory) as reader:
        journal.append(body(2))
        assert reader.read(2).body == body(2)
        with pytest.raises(BatchNotRecorded, match="readonly"):
            reader.append(b"x")


def test_two_processes_of_one_run_write_at_once(directory: Path) -> None:
    program = """
        import sys
        from pathlib import Path
        from atropos_client.journal import Journal
        journal = Journal.open(Path(sys.argv[1]), inherited_lock=int(sys.argv[2]))
        for _ in range(50):
            journal.append(b"x" * 50_000)
        journal.close()
    """
    with Journal.open(directory) as journal:
        assert journal.lock is not None
        descriptor = journal.lock.descriptor
        command = [sys.executable, "-c", _dedent(program), str(directory), str(descriptor)]
        child = subprocess.Popen(command, pass_fds=(descriptor,), cwd=ROOT)
        settled = 0
        while settled < 50:
            for number in journal.numbers_after(settled):
                journal.settle(number, "trained", step=number)
                settled = number
        assert child.wait() == 0
        assert outcomes(journal) == ["trained"] * 50


def test_the_lock_of_a_killed_run_is_free_only_when_its_child_is_gone_too(directory: Path) -> None:
    program = """
        import os, subprocess, sys
        from pathlib import Path
        from atropos_client.journal import Journal
        journal = Journal.open(Path(sys.argv[1]))
        child = subprocess.Popen(["sleep", "1000"], pass_fds=(journal.lock.descriptor,))
        print(child.pid, flush=True)
        child.wait()
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", _dedent(program), str(directory)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout is not None
    child_pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    try:
        with pytest.raises(JournalLocked):
            Journal.open(directory)
    finally:
        os.kill(child_pid, signal.SIGKILL)
    with Journal.open(directory, wait=30) as journal:
        assert journal.append(b"x") == 1


# Bounds.


def test_the_size_bound_refuses_the_next_batch_before_it_is_fetched(directory: Path) -> None:
    limits = JournalLimits(max_bytes=1_000_000, expected_bytes=1_000)
    with Journal.open(directory, limits=limits) as journal:
        journal.require_room()
        journal.append(os.urandom(600_000))
        with pytest.raises(JournalFull, match=r"may use 1\.0 MiB: no room for a batch of 0\.6 MiB"):
            journal.require_room()
        journal.settle(1, "trained", step=1)
        journal.prune(1)
        journal.require_room()


def test_a_disk_that_is_nearly_full_refuses_the_next_batch_before_it_is_fetched(directory: Path) -> None:
    limits = JournalLimits(min_free_bytes=1 << 60)
    with (
        Journal.open(directory, limits=limits) as journal,
        pytest.raises(JournalFull, match="No batch was taken from the API"),
    ):
        journal.require_room()


def test_a_write_that_fails_changes_nothing(directory: Path) -> None:
    program = """
        import os, resource, sys
        from pathlib import Path
        from atropos_client import BatchNotRecorded, JournalNotWritten
        from atropos_client.journal import Journal
        journal = Journal.open(Path(sys.argv[1]))
        journal.append(b"first")
        big = os.urandom(3_000_000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
        try:
            journal.append(big)
        except BatchNotRecorded as error:
            assert isinstance(error.__cause__, JournalNotWritten)
        else:
            sys.exit("the write did not fail")
        assert journal.append(b"second") == 2
        journal.close()
    """
    subprocess.run([sys.executable, "-c", _dedent(program), str(directory)], check=True, cwd=ROOT)
    with Journal.open(directory) as journal:
        assert [journal.read(number).body for number in journal.numbers_after(0)] == [b"first", b"second"]
        assert journal.verify().problems == ()


# Crashes and damage.


def test_after_a_kill_in_the_middle_of_writing_whole_batches_stay_and_a_line_says_so(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program = """
        import os, sys
        from pathlib import Path
        from atropos_client.journal import Journal
        journal = Journal.open(Path(sys.argv[1]))
        journal._connection.execute("PRAGMA cache_size=10")  # so that an unfinished write reaches the log
        journal.append(b"whole")
        journal._connection.execute("BEGIN")
        journal._connection.execute("INSERT INTO bodies VALUES (99, ?)", (os.urandom(2_000_000),))
        os.kill(os.getpid(), 9)
    """
    killed = subprocess.run([sys.executable, "-c", _dedent(program), str(directory)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
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
    import os, sys
    from pathlib import Path
    from atropos_client.journal import Journal
    journal = Journal.open(Path(sys.argv[1]))
    for number in range(1, 6):
        journal.append(os.urandom(40_000))
        journal.settle(number, "trained", step=number)
    journal.append(os.urandom(40_000))
    os.kill(os.getpid(), 9)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("killed") / "journal"
    run = subprocess.run([sys.executable, "-c", _dedent(KILLED), str(directory)], cwd=ROOT, check=False)
    assert run.returncode == -signal.SIGKILL
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


# Export.


def test_the_export_holds_what_came_and_what_became_of_it(journal: Journal) -> None:
    journal.append(body(1), served_version=3)
    journal.append(b"not JSON")
    journal.append(body(3))
    journal.settle(1, "trained", step=4)
    journal.prune(1)
    lines = [json.loads(line) for line in export_batches(journal, journal.numbers_after(0))]
    assert [line["number"] for line in lines] == [1, 2, 3]
    assert (lines[0]["outcome"], lines[0]["step"], lines[0]["reply"]) == ("trained", 4, None)
    assert lines[1]["body_base64"] == "bm90IEpTT04="
    assert lines[2]["reply"] == json.loads(body(3))
    groups = list(export_batches(journal, [1, 2, 3], form="groups"))
    assert [json.loads(line) for line in groups] == json.loads(body(3))["batch"]


def _dedent(program: str) -> str:
    return textwrap.dedent(program)

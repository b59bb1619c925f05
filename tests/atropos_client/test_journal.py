"""The journal of batches: what is durable, what is undone, and what is refused."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from atropos_client import (
    BatchNotRecorded,
    JournalFull,
    JournalLocked,
    JournalMismatch,
    NoSuchBatch,
)
from atropos_client.journal import Journal, JournalLimits, export_batches
from tests.atropos_client.journals import body, start_program
from tests.atropos_client.misbehaving_server import eventually


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
        journal = Journal.open(directory, inherited_lock=int(sys.argv[2]))
        for _ in range(50):
            journal.append(b"x" * 50_000)
        journal.close()
    """
    with Journal.open(directory) as journal:
        assert journal.lock is not None
        descriptor = journal.lock.descriptor
        child = start_program(program, directory, str(descriptor), pass_fds=(descriptor,))
        settled = 0
        while settled < 50:
            for number in journal.numbers_after(settled):
                journal.settle(number, "trained", step=number)
                settled = number
        assert child.wait() == 0
        assert outcomes(journal) == ["trained"] * 50


def test_the_lock_of_a_killed_run_is_free_only_when_its_child_is_gone_too(directory: Path) -> None:
    program = """
        import subprocess
        journal = Journal.open(directory)
        child = subprocess.Popen(["sleep", "1000"], pass_fds=(journal.lock.descriptor,))
        print(child.pid, flush=True)
        child.wait()
    """
    parent = start_program(program, directory, stdout=subprocess.PIPE)
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
        import resource
        from atropos_client import BatchNotRecorded, JournalNotWritten
        journal = Journal.open(directory)
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
    assert start_program(program, directory).wait() == 0
    with Journal.open(directory) as journal:
        assert [journal.read(number).body for number in journal.numbers_after(0)] == [b"first", b"second"]
        assert journal.verify().problems == ()


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

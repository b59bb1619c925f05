"""Appends bodies, tracks their outcomes, and keeps the journal within bounds."""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import time
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Final, Self

from atropos_client.errors import BatchNotRecorded, JournalError, JournalMismatch
from atropos_client.journal._database import (
    FILE_NAME,
    check_as_left,
    create_directory,
    format_of,
    open_database,
    open_read_only,
    translated_errors,
)
from atropos_client.journal._ledger import SEAL, count_write
from atropos_client.journal._lock import LOCK_NAME, WriterLock
from atropos_client.journal._marks import UNCLEAN_ENDS, Marks
from atropos_client.journal._reader import JournalReader
from atropos_client.journal._records import UNKNOWN_VERSION, JournalLimits, Outcome, RewindReport
from atropos_client.journal._rewind import Extent, extent_of, require_rewind
from atropos_client.journal._unrecorded import keep_unrecorded, unrecorded_bodies
from schemas import count_of

logger = logging.getLogger(__name__)

# A third of the size for a tenth of a second in 13 MB; higher levels gain little more. See the package.
_COMPRESSION_LEVEL: Final = 1


class Journal(JournalReader, AbstractContextManager["Journal"]):
    """A directory of batches. Threads may share it; so may the trainer and its fetching process.

    Example::

        with Journal.open(directory, wait=90) as journal:
            report = journal.rewind(checkpoint_batches)      # outcomes that no checkpoint counts are undone
            number = journal.append(body, served_version=7)  # on the disk when it returns
            journal.settle(number, "trained", step=8)
            journal.prune(batches_of_the_oldest_kept_checkpoint)

    Every method raises a :class:`~atropos_client.errors.JournalError` for what is wrong with the file.
    """

    def __init__(
        self,
        directory: Path,
        connection: sqlite3.Connection,
        *,
        marks: Marks,
        limits: JournalLimits,
        lock: WriterLock | None,
        accept_loss: bool = False,
    ) -> None:
        """Take over an open database; see `open` and `read_only`."""
        super().__init__(directory, connection, marks)
        self.limits = limits
        """Its bounds."""
        self.lock = lock
        """The right to write. None: opened for reading."""
        self._accept_loss = accept_loss
        self.possibly_lost = 0
        """Batches that nobody could count: whose reply was on its way when all processes of a run ended."""
        self._largest = 0
        if lock is not None:  # who only looks needs no room, and this visits every body
            self._largest = self._number("SELECT coalesce(max(length(zlib)), 0) FROM bodies")

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        limits: JournalLimits | None = None,
        wait: float = 0.0,
        lock: WriterLock | None = None,
        inherited_lock: int | None = None,
        accept_loss: bool = False,
    ) -> Self:
        """Open a journal for writing; make it if there is none. Says in one log line what a crash left.

        Bodies that the database did not take before are taken in. A batch that was being read when process
        after process ended is marked to be set aside.

        Args:
            directory: Created with permissions 0700.
            limits: Bounds on its space. None: the defaults.
            wait: Seconds to wait for another writer to end.
            lock: What `take_lock` gave; released when the journal is closed. None: take it.
            inherited_lock: Descriptor of the lock that the parent process holds. None: take the lock.
            accept_loss: Go on without what is missing of the journal.

        Raises:
            JournalLocked: Another run writes to it.
            JournalDamaged: The ledger is not what was written, or lacks something.
            JournalNotWritten: The directory or the file cannot be written.
        """
        create_directory(directory)
        own = inherited_lock is None
        if inherited_lock is not None:
            lock = WriterLock(inherited_lock)
        elif lock is None:
            lock = cls.take_lock(directory, wait=wait)
        with ExitStack() as closed_on_failure:
            closed_on_failure.callback(lock.release)
            marks = Marks(directory, writable=True)
            closed_on_failure.callback(marks.close)
            connection = open_database(directory / FILE_NAME, marks, fresh_start=own, accept_loss=accept_loss)
            closed_on_failure.callback(connection.close)
            journal = cls(
                directory,
                connection,
                marks=marks,
                limits=limits or JournalLimits(),
                lock=lock,
                accept_loss=accept_loss,
            )
            if own:
                journal._take_over()
            closed_on_failure.pop_all()
        return journal

    @staticmethod
    def take_lock(directory: Path, *, wait: float = 0.0) -> WriterLock:
        """Take the right to write, before there is anything to write to; the directory is made if need be.

        Raises:
            JournalLocked: Another run has it still, after `wait` seconds.
            JournalNotWritten: The directory or the lock cannot be written.
        """
        create_directory(directory)
        return WriterLock.acquire(directory / LOCK_NAME, wait=wait)

    @staticmethod
    def require_usable(directory: Path, *, after: int, accept_loss: bool = False) -> None:
        """See that a run could `open` the journal and `rewind` it to `after`; changes nothing.

        Raises:
            JournalError: It could not; see there.
        """
        path = directory / FILE_NAME
        marks = Marks(directory, writable=False)
        try:
            check_as_left(path, marks, accept_loss=accept_loss)
        finally:
            marks.close()
        for _ in unrecorded_bodies(directory):
            pass
        extent: Extent = (None, 0, None)
        if path.is_file() and path.stat().st_size:
            with closing(open_read_only(path, may_be_new=True)) as connection, translated_errors(path):
                if format_of(connection):
                    extent = extent_of(connection, after)
        require_rewind(directory, after, extent, accept_loss=accept_loss)

    @classmethod
    def read_only(cls, directory: Path) -> Self:
        """Open a journal to look at it, also while a run writes to it.

        Raises:
            JournalError: There is none, or it cannot be read.
        """
        connection = open_read_only(directory / FILE_NAME)
        marks = Marks(directory, writable=False)
        return cls(directory, connection, marks=marks, limits=JournalLimits(), lock=None)

    def close(self) -> None:
        """Close it in order, so that no log is left behind. May be called twice."""
        with self._guard:
            if self.lock is not None:
                try:
                    self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                except sqlite3.Error as error:  # closed before, or the other process still writes
                    logger.debug("The journal %s keeps its log: %s", self.directory, error)
            self._connection.close()
            self.marks.close()
            if self.lock is not None:
                self.lock.release()
                self.lock = None

    def __exit__(self, *_: object) -> None:
        self.close()

    # Writing.

    def append(self, body: bytes, served_version: int = UNKNOWN_VERSION) -> int:
        """Record a body; it is on the disk when this returns.

        Args:
            body: What the API sent, decompressed.
            served_version: Policy version that is served now; -1: unknown.

        Returns:
            The number of the batch.

        Raises:
            BatchNotRecorded: It could not be written. It lies beside the journal if that could be written,
                from where the next `open` takes it in.
        """
        received_at = time.time()
        try:
            return self._insert(body, received_at=received_at, served_version=served_version)
        except JournalError as error:
            kept = None
            if self.lock is not None:
                kept = keep_unrecorded(
                    self.directory, body, received_at=received_at, served_version=served_version
                )
            where = f"it is kept as {kept}, and the next start takes it in" if kept else "it is in no file"
            raise BatchNotRecorded(
                f"a batch of {len(body)} bytes is not in the journal: {error}; {where}"
            ) from error

    def _insert(self, body: bytes, *, received_at: float, served_version: int) -> int:
        compressed = zlib.compress(body, _COMPRESSION_LEVEL)
        with self._writing() as connection:
            cursor = connection.execute(
                "INSERT INTO batches (received_at, served_version, size, sha256) VALUES (?, ?, ?, ?)",
                (received_at, served_version, len(body), hashlib.sha256(body).digest()),
            )
            number = int(cursor.lastrowid or 0)
            connection.execute("INSERT INTO bodies VALUES (?, ?)", (number, compressed))
            connection.execute(f"{SEAL} = ?", (number,))
        self._largest = max(self._largest, len(compressed))
        return number

    def _take_over(self) -> None:
        """Put in order what the processes before have left."""
        for unrecorded in unrecorded_bodies(self.directory):
            # A start that died before it deleted the file has recorded it already.
            number = self._row(
                "SELECT number FROM batches WHERE received_at = ? AND sha256 = ?",
                unrecorded.received_at,
                hashlib.sha256(unrecorded.body).digest(),
            ) or (
                self._insert(
                    unrecorded.body,
                    received_at=unrecorded.received_at,
                    served_version=unrecorded.served_version,
                ),
            )
            unrecorded.path.unlink()
            logger.warning("Took %s into the journal, as batch %d.", unrecorded.path, number[0])
        if self.marks.get("polling_since"):
            self.possibly_lost = 1
            self.marks.set("polling_since", 0)
            logger.error(
                "The process that fetched ended while it was polling, so that a batch is possibly lost."
            )
        harmful = self.marks.blame()
        if harmful is not None and self.numbers_after(harmful - 1)[:1] == [harmful]:
            self.skip(harmful, f"the trainer ended {UNCLEAN_ENDS} times while it read this batch")

    def skip(self, number: int, reason: str) -> None:
        """Have a batch set aside unread when the run comes to it, also after a rewind.

        Args:
            number: Of the batch.
            reason: Why.

        Raises:
            NoSuchBatch: There is none of this number.
            JournalError: It does not wait any more.
        """
        outcome = self.entry(number).outcome
        if outcome != "received":
            raise JournalError(f"batch {number} is {outcome} already: only a batch that waits can be skipped")
        with self._writing() as connection:
            connection.execute("UPDATE batches SET skip_reason = ? WHERE number = ?", (reason, number))
            connection.execute(f"{SEAL} = ?", (number,))
        logger.warning("Batch %d will be set aside unread: %s", number, reason)

    @contextmanager
    def in_hand(self, number: int) -> Iterator[None]:
        """Note that a batch is being read: if that ends the process again and again, it is set aside.

        Raises:
            JournalError: There is not enough memory to read it.
        """
        self.marks.hold(number)
        try:
            yield
        except MemoryError as error:
            raise JournalError(
                f"there is not enough memory to read batch {number}. Start again with more; or set it aside "
                f"unread: `atropos-train journal skip {self.directory} {number}`, which the {UNCLEAN_ENDS}nd "
                "such end does by itself"
            ) from error
        self.marks.release()

    def settle(
        self, number: int, outcome: Outcome, *, step: int | None = None, reason: str | None = None
    ) -> None:
        """Note what became of a batch. Provisional until a checkpoint counts it; see `rewind`.

        Args:
            number: Of the batch.
            outcome: Anything but "received".
            step: Optimizer step that trained on it.
            reason: Why it was set aside or skipped.

        Raises:
            JournalMismatch: It has an outcome already: a batch counts once.
            NoSuchBatch: There is none of this number.
        """
        if outcome == "received":
            raise JournalMismatch(f"batch {number} cannot be settled as received; rewind undoes outcomes")
        with self._writing() as connection:
            changed = connection.execute(
                "UPDATE batches SET outcome = ?, step = ?, reason = ? "
                "WHERE number = ? AND outcome = 'received'",
                (outcome, step, reason, number),
            ).rowcount
            if not changed:
                before = self.entry(number).outcome
                raise JournalMismatch(f"batch {number} is {before} already and cannot become {outcome} too")
            connection.execute(f"{SEAL} = ?", (number,))

    def rewind(self, after: int) -> RewindReport:
        """Go back to a checkpoint: all batches after it are waiting again, in their order.

        Args:
            after: Number of the last batch that the checkpoint counts; 0: none.

        Raises:
            JournalMismatch: The journal ends before this batch, or a body that is needed was pruned.
        """
        with self._writing() as connection:
            self._check_rewind(connection, after)
            undone = connection.execute(
                "UPDATE batches SET outcome = 'received', step = NULL, reason = NULL "
                "WHERE number > ? AND outcome != 'received'",
                (after,),
            ).rowcount
            connection.execute(f"{SEAL} > ?", (after,))
            waiting, unsettled = connection.execute(
                "SELECT count(*) FILTER (WHERE number > :after), "
                "count(*) FILTER (WHERE number <= :after AND outcome = 'received') FROM batches",
                {"after": after},
            ).fetchone()
        if unsettled:
            logger.warning(
                "%s up to batch %d, which the checkpoint counts, without an outcome.",
                count_of(unsettled, "batch"),
                after,
            )
        return RewindReport(waiting=waiting, undone=undone)

    def _check_rewind(self, connection: sqlite3.Connection, after: int) -> None:
        extent = extent_of(connection, after)
        if require_rewind(self.directory, after, extent, accept_loss=self._accept_loss):
            return
        logger.warning("The journal %s begins after batch %d.", self.directory, after)
        connection.execute("DELETE FROM sqlite_sequence WHERE name = 'batches'")
        connection.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('batches', ?)", (after,))
        connection.execute("UPDATE state SET begin = ?", (after,))

    def prune(self, up_to: int) -> int:
        """Delete the bodies of batches that lie safely behind the oldest kept checkpoint; the ledger stays.

        Args:
            up_to: Number of the last batch that this checkpoint counts.

        Returns:
            How many bodies were deleted. Batches without an outcome are never pruned.
        """
        with self._writing() as connection:
            return connection.execute(
                "DELETE FROM bodies WHERE number <= ? AND number IN "
                "(SELECT number FROM batches WHERE number <= ? AND outcome != 'received')",
                (up_to, up_to),
            ).rowcount

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it is on the disk afterwards, or nothing."""
        with self._guard, translated_errors(self._path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                writes = count_write(self._connection)
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            self.marks.set("writes", writes)

    def require_room(self) -> None:
        """Make sure, before a batch is taken from the API, that it can be recorded.

        Raises:
            JournalFull: It may not fit; the message says what to do.
        """
        self.limits.require_room(self.directory, self.usage(), largest=self._largest)

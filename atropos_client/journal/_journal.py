"""The journal: append bodies, read them, note what became of them, and keep within bounds."""

from __future__ import annotations

import hashlib
import logging
import shutil
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from atropos_client.errors import (
    BatchNotRecorded,
    JournalDamaged,
    JournalError,
    JournalFull,
    JournalMismatch,
    NoSuchBatch,
)
from atropos_client.journal._database import (
    FILE_NAME,
    create_directory,
    damaged,
    open_database,
    open_read_only,
    translated_errors,
)
from atropos_client.journal._lock import WriterLock
from atropos_client.journal._records import (
    UNKNOWN_VERSION,
    JournaledBatch,
    JournalLimits,
    JournalUsage,
    LedgerEntry,
    Outcome,
    RewindReport,
    VerifyReport,
)

logger = logging.getLogger(__name__)

# A third of the size for a tenth of a second in 13 MB; higher levels gain little more. See the package.
_COMPRESSION_LEVEL: Final = 1

_ENTRY: Final = (
    "SELECT batches.number, received_at, served_version, size, sha256, outcome, step, reason, "
    "length(bodies.zlib) FROM batches LEFT JOIN bodies USING (number)"
)


class Journal:
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
        limits: JournalLimits,
        lock: WriterLock | None,
    ) -> None:
        """Take over an open database; see `open` and `read_only`."""
        self.directory = directory
        """Where it lies."""
        self.limits = limits
        """Its bounds."""
        self.lock = lock
        """The right to write. None: opened for reading."""
        self._path = directory / FILE_NAME
        self._connection = connection
        self._guard = threading.RLock()
        self._largest = int(self._one("SELECT coalesce(max(length(zlib)), 0) FROM bodies")[0])

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        limits: JournalLimits | None = None,
        wait: float = 0.0,
        inherited_lock: int | None = None,
    ) -> Self:
        """Open a journal for writing; make it if there is none. Says in one log line what a crash left.

        Args:
            directory: Created with permissions 0700.
            limits: Bounds on its space. None: the defaults.
            wait: Seconds to wait for another writer to end.
            inherited_lock: Descriptor of the lock that the parent process holds. None: take the lock.

        Raises:
            JournalLocked: Another run writes to it.
            JournalDamaged: The ledger is not what was written.
            JournalNotWritten: The directory or the file cannot be written.
        """
        create_directory(directory)
        own = inherited_lock is None
        lock = (
            WriterLock.acquire(directory / "lock", wait=wait)
            if inherited_lock is None
            else WriterLock(inherited_lock)
        )
        try:
            connection = open_database(directory / FILE_NAME, fresh_start=own)
        except BaseException:
            lock.release()
            raise
        return cls(directory, connection, limits=limits or JournalLimits(), lock=lock)

    @classmethod
    def read_only(cls, directory: Path) -> Self:
        """Open a journal to look at it, also while a run writes to it.

        Raises:
            JournalError: There is none, or it cannot be read.
        """
        connection = open_read_only(directory / FILE_NAME)
        return cls(directory, connection, limits=JournalLimits(), lock=None)

    def close(self) -> None:
        """Close it in order, so that no log is left behind. May be called twice."""
        with self._guard:
            if self.lock is not None:
                try:
                    self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                except sqlite3.Error as error:  # closed before, or the other process still writes
                    logger.debug("The journal %s keeps its log: %s", self.directory, error)
            self._connection.close()
            if self.lock is not None:
                self.lock.release()
                self.lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
            BatchNotRecorded: It could not be written; the body is attached.
        """
        received_at = time.time()
        digest = hashlib.sha256(body).digest()
        compressed = zlib.compress(body, _COMPRESSION_LEVEL)
        try:
            with self._writing() as connection:
                cursor = connection.execute(
                    "INSERT INTO batches (received_at, served_version, size, sha256) VALUES (?, ?, ?, ?)",
                    (received_at, served_version, len(body), digest),
                )
                number = int(cursor.lastrowid or 0)
                connection.execute("INSERT INTO bodies VALUES (?, ?)", (number, compressed))
        except JournalError as error:
            raise BatchNotRecorded(
                f"a batch of {len(body)} bytes is not in the journal: {error}", body=body
            ) from error
        self._largest = max(self._largest, len(compressed))
        return number

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
            waiting, unsettled = connection.execute(
                "SELECT count(*) FILTER (WHERE number > :after), "
                "count(*) FILTER (WHERE number <= :after AND outcome = 'received') FROM batches",
                {"after": after},
            ).fetchone()
        if unsettled:
            logger.warning("%d batches up to %d were counted but have no outcome.", unsettled, after)
        return RewindReport(waiting=waiting, undone=undone, unsettled=unsettled)

    def _check_rewind(self, connection: sqlite3.Connection, after: int) -> None:
        last = connection.execute("SELECT max(number) FROM batches").fetchone()[0]
        if last is None:
            # A run that began without a journal: its numbers go on where the checkpoint ended.
            connection.execute("DELETE FROM sqlite_sequence WHERE name = 'batches'")
            connection.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('batches', ?)", (after,))
        elif after > last:
            raise JournalMismatch(
                f"the checkpoint counts {after} batches but the journal {self.directory} ends with batch "
                f"{last}: they are not of the same run. Move the journal away to go on from the checkpoint "
                "without it"
            )
        pruned = connection.execute(
            "SELECT min(number) FROM batches WHERE number > ? AND number NOT IN (SELECT number FROM bodies)",
            (after,),
        ).fetchone()[0]
        if pruned is not None:
            raise JournalMismatch(
                f"batch {pruned} is needed after the checkpoint (which counts {after}) and its body was "
                "pruned: this checkpoint is older than those the journal was kept for"
            )

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
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    # Bounds.

    def require_room(self, expected_bytes: int | None = None) -> None:
        """Make sure, before a batch is taken from the API, that it can be recorded.

        Args:
            expected_bytes: Stored size of the coming batch. None: see `JournalLimits.expected_bytes`.

        Raises:
            JournalFull: It may not fit; the message says what to do.
        """
        usage = self.usage()
        expected = expected_bytes or max(self.limits.expected_bytes, self._largest)
        if usage.used + expected > self.limits.max_bytes:
            raise JournalFull(
                f"the journal {self.directory} uses {_mebibytes(usage.used)} and may use "
                f"{_mebibytes(self.limits.max_bytes)}: no room for a batch of {_mebibytes(expected)}. Let it "
                "use more, or write checkpoints more often: bodies behind the oldest kept one are deleted"
            )
        free = shutil.disk_usage(self.directory).free
        # A body is written twice, to the log and from there to its place, which may be space used again.
        needed = expected + max(0, expected - usage.reusable)
        if free - needed < self.limits.min_free_bytes:
            raise JournalFull(
                f"the disk of {self.directory} has {_mebibytes(free)} free: too little for a batch of "
                f"{_mebibytes(expected)} besides the {_mebibytes(self.limits.min_free_bytes)} that stay "
                "free. No batch was taken from the API; make room and start again"
            )

    def usage(self) -> JournalUsage:
        """Return the space that it takes."""
        pages, unused, page_size = (
            self._one(f"PRAGMA {name}")[0] for name in ("page_count", "freelist_count", "page_size")
        )
        return JournalUsage(used=(pages - unused) * page_size, reusable=unused * page_size)

    # Reading.

    def read(self, number: int) -> JournaledBatch:
        """Read a batch and verify its checksum.

        Raises:
            NoSuchBatch: There is none of this number, or its body was pruned.
            JournalDamaged: The body is not what was recorded.
        """
        entry = self.entry(number)
        row = self._row(
            "SELECT zlib FROM bodies WHERE number = ?", (number,), reading=f"the body of batch {number}"
        )
        if row is None:
            raise NoSuchBatch(
                f"the body of batch {number} ({entry.outcome}) was pruned from {self.directory}"
            )
        try:
            # Bounded: a damaged body must not unfold to any size.
            body = zlib.decompressobj().decompress(row[0], entry.size + 1)
        except zlib.error as error:
            raise damaged(
                self._path, f"the body of batch {number} cannot be decompressed ({error})"
            ) from error
        if len(body) != entry.size or hashlib.sha256(body).hexdigest() != entry.sha256:
            raise damaged(self._path, f"the body of batch {number} does not have the checksum it came with")
        return JournaledBatch(entry=entry, body=body)

    def entry(self, number: int) -> LedgerEntry:
        """Return the ledger's row of a batch.

        Raises:
            NoSuchBatch: There is none of this number.
        """
        row = self._row(f"{_ENTRY} WHERE batches.number = ?", (number,))
        if row is None:
            raise NoSuchBatch(f"the journal {self.directory} has no batch {number}")
        return _entry(row)

    def numbers_after(self, number: int) -> list[int]:
        """Return the numbers of all batches after this one, in order of arrival."""
        rows = self._rows("SELECT number FROM batches WHERE number > ? ORDER BY number", (number,))
        return [row[0] for row in rows]

    def ledger(self) -> Iterator[LedgerEntry]:
        """Iterate over all batches without their bodies, in order of arrival."""
        for number in self.numbers_after(0):
            yield self.entry(number)

    @property
    def last_number(self) -> int:
        """Number of the newest batch; 0: there is none."""
        return int(self._one("SELECT coalesce(max(number), 0) FROM batches")[0])

    def verify(self) -> VerifyReport:
        """Check the whole file and every body. Reads all of it."""
        try:
            problems = [row[0] for row in self._rows("PRAGMA integrity_check") if row[0] != "ok"]
            numbers = self.numbers_after(0)
        except JournalDamaged as error:
            return VerifyReport(batches=0, bodies=0, problems=(str(error),))
        bodies = 0
        for number in numbers:
            try:
                entry = self.entry(number)
                if entry.stored_size is not None:
                    bodies += 1
                    self.read(number)
                elif entry.outcome == "received":
                    problems.append(f"batch {number} has no outcome and no body")
            except JournalError as error:
                problems.append(str(error))
        return VerifyReport(batches=len(numbers), bodies=bodies, problems=tuple(problems))

    def _row(
        self, statement: str, values: tuple[Any, ...] = (), *, reading: str = ""
    ) -> tuple[Any, ...] | None:
        rows = self._rows(statement, values, reading=reading)
        return rows[0] if rows else None

    def _one(self, statement: str) -> tuple[Any, ...]:
        return self._rows(statement)[0]

    def _rows(
        self, statement: str, values: tuple[Any, ...] = (), *, reading: str = ""
    ) -> list[tuple[Any, ...]]:
        with self._guard, translated_errors(self._path, reading):
            return self._connection.execute(statement, values).fetchall()


def _entry(row: tuple[Any, ...]) -> LedgerEntry:
    number, received_at, served_version, size, sha256, outcome, step, reason, stored_size = row
    return LedgerEntry(
        number=number,
        received_at=received_at,
        served_version=served_version,
        size=size,
        sha256=sha256.hex(),
        outcome=outcome,
        step=step,
        reason=reason,
        stored_size=stored_size,
    )


def _mebibytes(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"

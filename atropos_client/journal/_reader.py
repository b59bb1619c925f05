"""Reads a journal: bodies, the ledger, the space it takes, and whether it is what was written."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from atropos_client.errors import JournalDamaged, JournalError, NoSuchBatch
from atropos_client.journal._database import FILE_NAME, damaged, translated_errors
from atropos_client.journal._ledger import IS_WHOLE, find_problems
from atropos_client.journal._marks import Marks
from atropos_client.journal._records import (
    JournaledBatch,
    JournalUsage,
    LedgerEntry,
    Outcome,
    VerifyReport,
)

_FIELDS: Final = tuple(LedgerEntry.__dataclass_fields__)
_ENTRY: Final = (
    "SELECT number, received_at, served_version, size, lower(hex(sha256)), outcome, step, reason, "  # noqa: S608
    f"skip_reason, length(bodies.zlib), {IS_WHOLE} FROM batches LEFT JOIN bodies USING (number)"
)


class JournalReader:
    """Reads a journal. Threads may share it."""

    def __init__(self, directory: Path, connection: sqlite3.Connection, marks: Marks) -> None:
        """Take over an open database."""
        self.directory = directory
        """Where it lies."""
        self.marks = marks
        """Notes of its processes to each other, and to the next start."""
        self._path = directory / FILE_NAME
        self._connection = connection
        self._guard = threading.RLock()

    def read(self, number: int) -> JournaledBatch:
        """Read a batch and verify its checksum.

        Raises:
            NoSuchBatch: There is none of this number, or its body was pruned.
            JournalDamaged: The body is not what was recorded.
        """
        entry = self.entry(number)
        found = f"the body of batch {number}"
        row = self._row("SELECT zlib FROM bodies WHERE number = ?", number, reading=found)
        if row is None:
            raise NoSuchBatch(f"{found} ({entry.outcome}) was pruned from {self.directory}")
        try:
            # Bounded: a damaged body must not unfold to any size.
            body = zlib.decompressobj().decompress(row[0], entry.size + 1)
        except (zlib.error, TypeError) as error:
            raise damaged(self._path, f"{found} cannot be decompressed ({error})") from error
        if len(body) != entry.size or hashlib.sha256(body).hexdigest() != entry.sha256:
            raise damaged(self._path, f"{found} does not have the checksum it came with")
        return JournaledBatch(entry=entry, body=body)

    def entry(self, number: int) -> LedgerEntry:
        """Return the ledger's row of a batch.

        Raises:
            NoSuchBatch: There is none of this number.
        """
        row = self._row(f"{_ENTRY} WHERE number = ?", number)
        if row is None:
            raise NoSuchBatch(f"the journal {self.directory} has no batch {number}")
        *fields, is_whole = row
        if not is_whole:
            raise damaged(self._path, f"the ledger's row of batch {number} is not what was written")
        return LedgerEntry(**dict(zip(_FIELDS, fields, strict=True)))

    def numbers_after(self, number: int) -> list[int]:
        """Return the numbers of all batches after this one, in order of arrival."""
        with self._guard, translated_errors(self._path):
            rows = self._connection.execute(
                "SELECT number FROM batches WHERE number > ? ORDER BY number", (number,)
            )
            return [row[0] for row in rows]

    def ledger(self) -> Iterator[LedgerEntry]:
        """Iterate over all batches without their bodies, in order of arrival."""
        for number in self.numbers_after(0):
            yield self.entry(number)

    def newest(
        self, limit: int, *, before: int | None = None, outcome: Outcome | None = None
    ) -> list[LedgerEntry]:
        """Return the newest batches without their bodies, newest first.

        Args:
            limit: As many at most.
            before: Only batches with a smaller number.
            outcome: Only batches of this outcome.
        """
        with self._guard, translated_errors(self._path):
            rows = self._connection.execute(
                "SELECT number FROM batches WHERE number < coalesce(?, number + 1) "
                "AND outcome = coalesce(?, outcome) ORDER BY number DESC LIMIT ?",
                (before, outcome, limit),
            )
            return [self.entry(row[0]) for row in rows.fetchall()]

    def outcomes(self) -> dict[Outcome, int]:
        """Count the batches of each outcome."""
        with self._guard, translated_errors(self._path):
            rows = self._connection.execute("SELECT outcome, count(*) FROM batches GROUP BY outcome")
            return dict(rows.fetchall())

    @property
    def last_number(self) -> int:
        """Number of the newest batch; 0: there is none."""
        return self._number("SELECT coalesce(max(number), 0) FROM batches")

    def verify(self) -> VerifyReport:
        """Check the whole file and every body. Reads all of it."""
        try:
            with self._guard, translated_errors(self._path):
                checked = self._connection.execute("PRAGMA integrity_check")
                problems = [row[0] for row in checked if row[0] != "ok"]
                problems += find_problems(self._connection)
            written, known = self._number("SELECT writes FROM state"), self.marks.get("writes")
            if written < known:
                problems.append(f"the last {known - written} of {known} writes are missing")
            numbers = self.numbers_after(0)
        except JournalDamaged as error:
            return VerifyReport(batches=0, bodies=0, problems=(error.found,))
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

    def usage(self) -> JournalUsage:
        """Return the space that it takes."""
        pages, unused, page_size = (
            self._number(f"PRAGMA {name}") for name in ("page_count", "freelist_count", "page_size")
        )
        return JournalUsage(used=(pages - unused) * page_size, reusable=unused * page_size)

    def _row(self, statement: str, *values: Any, reading: str = "") -> tuple[Any, ...] | None:
        with self._guard, translated_errors(self._path, reading):
            row: tuple[Any, ...] | None = self._connection.execute(statement, values).fetchone()
            return row

    def _number(self, statement: str) -> int:
        row = self._row(statement)
        assert row is not None  # noqa: S101 - for the type checker: each of these has one
        return int(row[0])

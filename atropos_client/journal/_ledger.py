"""Defines the tables of the journal, and finds what in the ledger is not what was written.

Every row has a checksum of its own. That none is missing is known from the numbers, which have no gap between
the first and the last that were given out; that no transaction is missing, from a count of them.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from typing import Any, Final

FORMAT: Final = 2

_TABLES: Final = (
    # Bodies have a table of their own: SQLite rewrites a whole row when an outcome is noted in it.
    """CREATE TABLE batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    received_at REAL NOT NULL,
    served_version INTEGER NOT NULL,
    size INTEGER NOT NULL,
    sha256 BLOB NOT NULL,
    outcome TEXT NOT NULL DEFAULT 'received'
        CHECK (outcome IN ('received', 'trained', 'set_aside', 'skipped')),
    step INTEGER,
    reason TEXT,
    skip_reason TEXT,
    checksum BLOB
)""",
    "CREATE TABLE bodies (number INTEGER PRIMARY KEY REFERENCES batches, zlib BLOB NOT NULL)",
    # One row: batches before the first of this journal, and transactions since it was made.
    "CREATE TABLE state (begin INTEGER NOT NULL, writes INTEGER NOT NULL)",
)

CREATE: Final = ";\n".join(
    [
        "BEGIN IMMEDIATE",
        *_TABLES,
        "INSERT INTO state VALUES (0, 0)",
        f"PRAGMA user_version={FORMAT}",
        "COMMIT;",
    ]
)

# As bytes: text that was damaged may not be text any more.
_CHECKSUM: Final = (
    "row_checksum(number, received_at, served_version, size, sha256, CAST(outcome AS BLOB), step, "
    "CAST(reason AS BLOB), CAST(skip_reason AS BLOB))"
)
IS_WHOLE: Final = f"checksum IS {_CHECKSUM}"
SEAL: Final = f"UPDATE batches SET checksum = {_CHECKSUM} WHERE number"  # noqa: S608
"""To be followed by a condition: has to end every change of rows."""


def prepare_connection(connection: sqlite3.Connection) -> None:
    """Let a connection read damaged text, and compute the checksums of rows."""
    connection.text_factory = lambda raw: raw.decode(errors="replace")
    connection.create_function("row_checksum", -1, _row_checksum, deterministic=True)


def count_write(connection: sqlite3.Connection) -> int:
    """Count the transaction that is open; returns how many there are."""
    return int(connection.execute("UPDATE state SET writes = writes + 1 RETURNING writes").fetchone()[0])


def find_problems(connection: sqlite3.Connection) -> Iterator[str]:
    """Yield what is wrong with the ledger; says nothing of bodies, which are many gigabytes."""
    tables = [
        row[0] for row in connection.execute("SELECT sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%'")
    ]
    if tables != list(_TABLES):
        yield "its tables are not those of a journal"
        return
    yield from (row[0] for row in connection.execute("PRAGMA quick_check('batches')") if row[0] != "ok")
    for (number,) in connection.execute(f"SELECT number FROM batches WHERE NOT {IS_WHOLE}"):  # noqa: S608
        yield f"the ledger's row of batch {number} is not what was written"
    states = connection.execute("SELECT begin FROM state").fetchall()
    given_out = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'batches'").fetchone()
    count, first, last = connection.execute(
        "SELECT count(*), min(number), max(number) FROM batches"
    ).fetchone()
    begin = states[0][0] if len(states) == 1 else None
    expected: tuple[int | None, ...] = (0, None, None)
    if given_out is not None and given_out[0] != begin and isinstance(begin, int):
        expected = (given_out[0] - begin, begin + 1, given_out[0])
    if begin is None or (count, first, last) != expected:
        yield (
            f"its ledger has {count} batches, {first} to {last}, where batches after {begin} to "
            f"{given_out[0] if given_out else begin} were recorded"
        )


def _row_checksum(*values: Any) -> bytes:
    return hashlib.sha256(repr(values).encode()).digest()

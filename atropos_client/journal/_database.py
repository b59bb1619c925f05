"""The SQLite file: creating and opening it, what a crash left behind, and the translation of its errors."""

from __future__ import annotations

import logging
import os
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

from atropos_client.errors import JournalDamaged, JournalError, JournalLocked, JournalNotWritten
from atropos_client.private_files import make_private_directory

logger = logging.getLogger(__name__)

FILE_NAME: Final = "journal.sqlite3"
FORMAT: Final = 1
_PAGE_SIZE: Final = 16384
# Another process's append holds the database for as long as its write takes.
_BUSY_SECONDS: Final = 60.0
# The write-ahead log shrinks back to this after a large batch.
_LOG_SIZE_LIMIT: Final = 64 << 20

# Bodies have a table of their own: SQLite rewrites a whole row when an outcome is noted in it.
_SCHEMA: Final = """
CREATE TABLE batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    received_at REAL NOT NULL,
    served_version INTEGER NOT NULL,
    size INTEGER NOT NULL,
    sha256 BLOB NOT NULL,
    outcome TEXT NOT NULL DEFAULT 'received'
        CHECK (outcome IN ('received', 'trained', 'set_aside', 'skipped')),
    step INTEGER,
    reason TEXT
);
CREATE TABLE bodies (number INTEGER PRIMARY KEY REFERENCES batches, zlib BLOB NOT NULL);
"""

_UNREADABLE: Final = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT}


@dataclass(frozen=True, kw_only=True)
class LeftBehind:
    """What was in the write-ahead log when the file was opened."""

    recovered_pages: int
    """Of transactions that were whole."""

    cut_off_pages: int
    """Of a transaction that was not."""


def create_directory(directory: Path) -> None:
    """Make the directory, durable and private.

    Raises:
        JournalNotWritten: It cannot be made.
    """
    try:
        missing = [path for path in (directory, *directory.parents) if not path.is_dir()]
        make_private_directory(directory)
        for path in missing:
            sync_directory(path.parent)
    except OSError as error:
        raise JournalNotWritten(f"cannot create the journal's directory {directory}: {error}") from error


def open_database(path: Path, *, fresh_start: bool) -> sqlite3.Connection:
    """Open the file for writing; create it if there is none.

    Args:
        path: The file.
        fresh_start: Nobody else writes: say what a crash left behind, and check the ledger.

    Raises:
        JournalDamaged: It is no journal, or not whole.
        JournalError: It has a format of another version, or cannot be written.
    """
    try:
        # Before SQLite does: it would give it the permissions of the umask. Its other files copy these.
        # Never a file that is there: closing it would end the locks that SQLite holds on it in this process.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        pass
    except OSError as error:
        raise JournalNotWritten(f"cannot open the journal {path}: {error}") from error
    log_header = _read_log_header(path) if fresh_start else None
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        with translated_errors(path):
            connection.execute("PRAGMA trusted_schema=OFF")
            connection.execute(f"PRAGMA page_size={_PAGE_SIZE}")
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA fullfsync=ON")  # where fsync alone stops at the drive's cache
            connection.execute("PRAGMA checkpoint_fullfsync=ON")
            connection.execute(f"PRAGMA journal_size_limit={_LOG_SIZE_LIMIT}")
            if log_header is not None:
                _report(path, _left_behind(connection, path, log_header))
            _check_format(connection, path, may_create=True)
            if fresh_start:
                _check_ledger(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def open_read_only(path: Path) -> sqlite3.Connection:
    """Open the file beside whoever writes it.

    Raises:
        JournalError: There is none, or it cannot be read.
    """
    if not path.is_file():
        raise JournalError(f"there is no journal in {path.parent} (no file {path.name})")
    uri = f"file:{quote(str(path.absolute()))}?mode=ro"
    connection = sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)
    try:
        with translated_errors(path):
            connection.execute("PRAGMA trusted_schema=OFF")  # it may be somebody else's
            _check_format(connection, path, may_create=False)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_format(connection: sqlite3.Connection, path: Path, *, may_create: bool) -> None:
    found = connection.execute("PRAGMA user_version").fetchone()[0]
    if found == 0 and may_create:
        connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version={FORMAT}; COMMIT;")
        # SQLite makes what is in its files durable; that the files have names is our part.
        sync_directory(path.parent)
    elif found != FORMAT:
        raise JournalError(f"{path} has format {found}; this version reads format {FORMAT}")


def _check_ledger(connection: sqlite3.Connection, path: Path) -> None:
    """Look for damage in the ledger alone: bodies have checksums, and are many gigabytes."""
    problems = [row[0] for row in connection.execute("PRAGMA quick_check('batches')")]
    if problems != ["ok"]:
        raise damaged(path, "; ".join(problems))


@contextmanager
def translated_errors(path: Path, reading: str = "") -> Iterator[None]:
    """Turn what SQLite raises into errors of ours. The only place that does. `reading`: what is read."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code in _UNREADABLE:
            raise damaged(path, f"{reading}: {error}" if reading else str(error)) from error
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise JournalLocked(f"{path} stayed locked for {_BUSY_SECONDS:g} s by another process") from error
        raise JournalNotWritten(f"the journal {path} failed: {error}") from error


def damaged(path: Path, found: str) -> JournalDamaged:
    """Say that the file is damaged, and what to do."""
    return JournalDamaged(
        f"the journal {path} is damaged: {found}. `atropos-train journal verify {path.parent}` lists what "
        f"is, `atropos-train journal export {path.parent}` saves what can be read; then move the directory "
        "away and start again: the run goes on from its newest checkpoint, without the batches after it"
    )


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# What a crash left behind. A write-ahead log is a header of 32 bytes and then, page by page, a header of 24
# bytes and the page; a frame whose salts are not those of the header is a rest of an earlier use of the file.
# https://www.sqlite.org/fileformat2.html#the_write_ahead_log


@dataclass(frozen=True)
class _LogHeader:
    page_size: int
    salts: bytes


def _read_log_header(path: Path) -> _LogHeader | None:
    """Read the header of the log that lies beside `path`; None if there is none, as after a clean end."""
    log = path.with_name(path.name + "-wal")
    if not log.is_file():
        return None
    with log.open("rb") as file:
        header = file.read(32)
    if len(header) < 32:
        return None
    return _LogHeader(page_size=struct.unpack(">I", header[8:12])[0], salts=header[16:24])


def _left_behind(connection: sqlite3.Connection, path: Path, header: _LogHeader) -> LeftBehind:
    """Compare what SQLite takes from the log with what is in it."""
    written = 0
    with path.with_name(path.name + "-wal").open("rb") as file:
        position = 32
        while True:
            file.seek(position)
            frame = file.read(24)
            if len(frame) < 24 or frame[8:16] != header.salts:
                break
            written += 1
            position += 24 + header.page_size
    # SQLite read the log up to the last whole transaction when it opened the file; this tells how far.
    whole = max(0, connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1])
    return LeftBehind(recovered_pages=whole, cut_off_pages=max(0, written - whole))


def _report(path: Path, left: LeftBehind) -> None:
    if not left.recovered_pages and not left.cut_off_pages:
        return
    logger.warning(
        "The journal %s was not closed in order (a kill, a crash or a power cut): %d pages of whole writes "
        "recovered from its log, %d pages of an unfinished write cut off.",
        path.parent,
        left.recovered_pages,
        left.cut_off_pages,
    )

"""Creates and opens the SQLite file, reports what a crash left behind, and translates its errors."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import quote

from atropos_client.errors import JournalDamaged, JournalError, JournalLocked, JournalNotWritten
from atropos_client.journal._ledger import CREATE, FORMAT, find_problems, prepare_connection
from atropos_client.journal._marks import Marks
from atropos_client.private_files import make_private_directory
from atropos_client.readable import require_readable, why_not_there

logger = logging.getLogger(__name__)

FILE_NAME: Final = "journal.sqlite3"
_PAGE_SIZE: Final = 16384
# Another process's append holds the database for as long as its write takes.
_BUSY_SECONDS: Final = 60.0
# The write-ahead log shrinks back to this after a large batch.
_LOG_SIZE_LIMIT: Final = 64 << 20

_PROBLEMS_SAID: Final = 3

_UNREADABLE: Final = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT}


def create_directory(directory: Path) -> None:
    """Make the directory, durable and private.

    Raises:
        JournalNotWritten: It cannot be made.
    """
    try:
        missing = [path for path in (directory, *directory.parents) if not path.is_dir()]
        make_private_directory(directory)
        for path in directory.iterdir():
            if path.is_symlink():  # of ours none is; who writes through one writes somebody else's file
                raise PermissionError(f"{path} is a symbolic link; it is not followed")
        for path in missing:
            sync_directory(path.parent)
    except OSError as error:
        raise JournalNotWritten(f"cannot create the journal's directory {directory}: {error}") from error


def open_database(
    path: Path, marks: Marks, *, fresh_start: bool, accept_loss: bool = False
) -> sqlite3.Connection:
    """Open the file for writing; create it if there is none.

    Args:
        path: The file.
        marks: Those of its processes.
        fresh_start: Nobody else writes: say what a crash left behind, and check the ledger.
        accept_loss: Go on without writes that are missing.

    Raises:
        JournalDamaged: It is no journal, or not whole.
        JournalError: It has a format of another version, or cannot be written.
    """
    if fresh_start and (loss := check_as_left(path, marks, accept_loss=accept_loss)) is not None:
        missing, writes = loss
        marks.set("writes", writes)
        logger.warning("%s; going on without it, as journal.accept_loss says.", missing)
    try:
        # Before SQLite does: it would give it the permissions of the umask. Its other files copy these.
        # Never a file that is there: closing it would end the locks that SQLite holds on it in this process.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        pass
    except OSError as error:
        raise JournalNotWritten(f"cannot open the journal {path}: {error}") from error
    _require_readable(path)
    log = path.with_name(path.name + "-wal")  # gone after a clean end
    if fresh_start and path.stat().st_size and log.is_file() and log.stat().st_size:
        logger.warning(
            "The journal %s was not closed in order (a kill, a crash or a power cut): whole writes are "
            "recovered from its log, one that was not finished is cut off.",
            path.parent,
        )
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        with translated_errors(path):
            connection.execute("PRAGMA trusted_schema=OFF")
            prepare_connection(connection)
            connection.execute(f"PRAGMA page_size={_PAGE_SIZE}")
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA fullfsync=ON")  # where fsync alone stops at the drive's cache
            connection.execute("PRAGMA checkpoint_fullfsync=ON")
            connection.execute(f"PRAGMA journal_size_limit={_LOG_SIZE_LIMIT}")
            if fresh_start:
                _create_tables(connection, path)
            _check_format(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def open_read_only(path: Path, *, may_be_new: bool = False) -> sqlite3.Connection:
    """Open the file beside whoever writes it. `may_be_new`: whether it may have no tables yet.

    Raises:
        JournalError: There is none, or it cannot be read.
    """
    _require_readable(path)
    if not path.is_file():
        why = f"no file {path.name}" if path.parent.is_dir() else why_not_there(path.parent)
        raise JournalError(f"there is no journal in {path.parent}: {why}")
    uri = f"file:{quote(str(path.absolute()))}?mode=ro"
    connection = sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)
    try:
        with translated_errors(path):
            connection.execute("PRAGMA trusted_schema=OFF")  # it may be somebody else's
            prepare_connection(connection)
            if not (may_be_new and format_of(connection) == 0):
                _check_format(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _require_readable(path: Path) -> None:
    """Name the file that may not be read: SQLite says of it, and of any other, that it cannot be opened."""
    try:
        for ending in ("", "-wal", "-shm"):
            require_readable(path.with_name(path.name + ending))
    except PermissionError as error:
        raise JournalError(f"{error.filename} cannot be opened: {error.strerror}") from error


def format_of(connection: sqlite3.Connection) -> int:
    """Read the format of the file; 0: it has no tables yet."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _check_format(connection: sqlite3.Connection, path: Path) -> None:
    found = format_of(connection)
    if found == 0:
        raise JournalError(f"{path} holds nothing: it is new, was emptied, or its log is damaged")
    if found != FORMAT:
        raise JournalError(f"{path} has format {found}; this version reads format {FORMAT}")


def _create_tables(connection: sqlite3.Connection, path: Path) -> None:
    if format_of(connection) == 0:
        connection.executescript(CREATE)
        # SQLite makes what is in its files durable; that the files have names is our part.
        sync_directory(path.parent)


def check_as_left(path: Path, marks: Marks, *, accept_loss: bool) -> tuple[str, int] | None:
    """Before anything is written: is everything there that was written before?

    Whoever opens the file for writing, or only closes it, throws away what the log holds behind a damage.

    Returns:
        What is missing, and how many writes are there; None: nothing is missing.

    Raises:
        JournalDamaged: The ledger is not what was written; or writes are missing, and that is not accepted.
    """
    writes, least = 0, marks.get("writes")
    if path.is_file() and path.stat().st_size:
        with closing(open_read_only(path, may_be_new=True)) as connection, translated_errors(path):
            if format_of(connection):
                problems = list(find_problems(connection))
                if problems:
                    raise damaged(path, "; ".join(problems[:_PROBLEMS_SAID]))
                writes = connection.execute("SELECT writes FROM state").fetchone()[0]
    else:
        log = path.with_name(path.name + "-wal")
        least = max(least, int(log.is_file() and log.stat().st_size > 0))
    missing = least - writes
    if missing <= 0:
        return None
    found = (
        f"the journal {path} lacks the last {missing} of {writes + missing} writes that were made to it: it "
        "or its log was damaged, emptied, or replaced by an older copy. Batches that were recorded may be "
        "lost with them"
    )
    if not accept_loss:
        raise JournalDamaged(
            f"{found}. Put the whole files back, or start once with --journal.accept_loss true to go on "
            "without what is missing"
        )
    return found, writes


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
    what = f"the journal {path} is damaged: {found}"
    return JournalDamaged(
        f"{what}. `atropos-train journal verify {path.parent}` lists what "
        f"is, `atropos-train journal export {path.parent}` saves what can be read; then move the directory "
        "away and start once with --journal.accept_loss true: the run goes on from its newest checkpoint, "
        "without the batches after it",
        found=what,
    )


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

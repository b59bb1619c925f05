"""Locks a journal, and the run directory around it, for one run at a time.

A lock of the operating system (flock) on a file. It belongs to the open file, not to the process: a trainer
hands its descriptor to its fetching process, and the lock is free when both are gone, however they ended.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import stat
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self

from atropos_client.clock import running_time
from atropos_client.errors import JournalLocked, JournalNotWritten

logger = logging.getLogger(__name__)

LOCK_NAME: Final = "lock"
"""The file, in the journal's directory."""

_POLL_SECONDS = 0.05


class WriterLock:
    """A held lock. `release` it, or let the processes that share it end."""

    def __init__(self, descriptor: int) -> None:
        """Take over a descriptor whose lock is held already, for example an inherited one."""
        self.descriptor = descriptor
        """To be passed on to a child process that shares the lock."""
        self._since = datetime.now(tz=UTC)

    @classmethod
    def acquire(cls, path: Path, *, wait: float = 0.0) -> Self:
        """Take the lock.

        Args:
            path: The lock file; created if need be, never deleted.
            wait: Seconds to wait for its holder, for example a fetching process that finishes its last poll.

        Raises:
            JournalLocked: It is still held after `wait` seconds; the message names the holder.
            JournalNotWritten: The file cannot be opened or locked, or is no ordinary file.
        """
        descriptor = _open(path)
        try:
            _take(descriptor, path, wait)
            lock = cls(descriptor)
            lock.name_holders(os.getpid())
        except BaseException:
            os.close(descriptor)
            raise
        return lock

    def share(self) -> Self:
        """Hold the lock once more: it is free when each of these was released."""
        shared = type(self)(os.dup(self.descriptor))
        shared._since = self._since
        return shared

    def name_holders(self, *pids: int) -> None:
        """Write down which processes hold the lock, for the message that others get."""
        names = " and ".join(str(pid) for pid in pids)
        text = f"{names} on {socket.gethostname()}, since {self._since.isoformat()}".encode()
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, text, 0)
        os.fsync(self.descriptor)  # for other machines, which may look at it over a network

    def release(self) -> None:
        """Close our descriptor; whoever shares it keeps the lock. May be called twice."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _open(path: Path) -> int:
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        is_link = error.errno == errno.ELOOP
        why = "it is a symbolic link, which is not followed" if is_link else error.strerror
        raise JournalNotWritten(f"cannot open the lock {path}: {why}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise JournalNotWritten(f"cannot open the lock {path}: it is no ordinary file")
    return descriptor


def _take(descriptor: int, path: Path, wait: float) -> None:
    deadline = running_time() + wait
    said = False
    while not _try_lock(descriptor, path):
        holders = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "unknown"
        if running_time() >= deadline:
            raise JournalLocked(
                f"{path.parent} is being written by process {holders}"
                f"{f'; still after {wait:g} s' if wait else ''}: two runs cannot share a directory; wait "
                "for that one or stop it, or choose another train.output_dir"
            )
        if not said:
            logger.info("Waiting up to %g s for process %s to release %s", wait, holders, path.parent)
            said = True
        time.sleep(_POLL_SECONDS)


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise JournalNotWritten(
            f"cannot lock {path}: {error.strerror}; train.output_dir needs a file system that has locks"
        ) from error
    return True

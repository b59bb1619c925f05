"""One run writes to a journal at a time.

A lock of the operating system (flock) on a file. It belongs to the open file, not to the process: a trainer
hands its descriptor to its fetching process, and the lock is free when both are gone, however they ended.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from pathlib import Path
from typing import Self

from atropos_client.errors import JournalLocked

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05


class WriterLock:
    """A held lock. `release` it, or let the processes that share it end."""

    def __init__(self, descriptor: int) -> None:
        """Take over a descriptor whose lock is held already, for example an inherited one."""
        self.descriptor = descriptor
        """To be passed on to a child process that shares the lock."""

    @classmethod
    def acquire(cls, path: Path, *, wait: float = 0.0) -> Self:
        """Take the lock.

        Args:
            path: The lock file; created if need be, never deleted.
            wait: Seconds to wait for its holder, for example a fetching process that finishes its last poll.

        Raises:
            JournalLocked: It is still held after `wait` seconds; the message names the holder.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + wait
        said = False
        while not _try_lock(descriptor):
            holders = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "unknown"
            if time.monotonic() >= deadline:
                os.close(descriptor)
                raise JournalLocked(
                    f"{path.parent} is being written by process {holders}"
                    f"{f', still after {wait:g} s' if wait else ''}: two runs cannot share a journal; wait "
                    "for that one or stop it, or choose another train.output_dir"
                )
            if not said:
                logger.info(
                    "Waiting up to %g s for process %s to release the journal %s", wait, holders, path.parent
                )
                said = True
            time.sleep(_POLL_SECONDS)
        lock = cls(descriptor)
        lock.name_holders(os.getpid())
        return lock

    def name_holders(self, *pids: int) -> None:
        """Write down which processes hold the lock, for the message that others get."""
        text = " and ".join(str(pid) for pid in pids).encode()
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, text, 0)

    def release(self) -> None:
        """Close our descriptor; processes that inherited it keep the lock."""
        os.close(self.descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

"""Starts the process that fetches, listens to it, and starts it again when it was killed."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Final

from atropos_client.backoff import Backoff
from atropos_client.errors import FetcherDied
from atropos_client.fetcher._child import FAILED
from atropos_client.fetcher._last_words import read_last_words
from atropos_client.fetcher._settings import FetcherSettings, Order
from atropos_client.journal import Journal

logger = logging.getLogger(__name__)

_ROOT: Final = Path(__file__).parent.parent.parent
_TICK_SECONDS: Final = 0.1  # how soon a new served version or step is passed on
_LONGEST_RESTART_PAUSE: Final = 10.0
_MOST_RESTARTS: Final = 3  # in a row, without a batch between
_EXIT_PATIENCE: Final = 30.0  # for a process that has closed its output to end


class FetchingProcess:
    """Runs `python -m atropos_client.fetcher`, one after the other if they are killed.

    Its standard input and output say only that there is something new in the journal, or in its marks; after
    the settings at the start, which hold credentials, and before the last words of a failure.
    """

    def __init__(self, journal: Journal, settings: FetcherSettings) -> None:
        """Prepare; see `Fetcher` for the arguments.

        Raises:
            ValueError: If the journal cannot be written.
        """
        if journal.lock is None:
            raise ValueError("the journal is open for reading only")
        self._lock = journal.lock
        self._journal = journal
        self._settings = settings
        self._restarts = 0
        self._pauses = Backoff(first=0.2, longest=_LONGEST_RESTART_PAUSE)
        self._guard = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()

    @property
    def pid(self) -> int | None:
        """Process id; None: there is none now."""
        child = self._child
        return None if child is None else child.pid

    def silent_seconds(self) -> float:
        """Return how long it has given no sign of life."""
        return time.monotonic() - self._journal.marks.get("alive_at") / 1e9

    def wake(self) -> None:
        """Let it look at the journal's marks; from any thread."""
        with self._guard, contextlib.suppress(BrokenPipeError, BlockingIOError):
            if self._child is not None:
                _pipe(self._child.stdin).write(b"\n")

    def stop(self) -> None:
        """Let the poll under way be the last; from any thread."""
        with self._guard:
            self._stopping.set()
            if self._child is not None:
                _pipe(self._child.stdin).close()

    def run(self) -> Iterator[None]:
        """Yield ten times a second, and whenever there may be a new batch, until `stop`.

        Raises:
            AtroposClientError: What ended the fetching.
        """
        while not self._stopping.is_set():
            child = self._start()
            last_words = yield from self._listen(child)
            code = _exit_code(child)
            with self._guard:
                self._child = None
                _pipe(child.stdin).close()
            _pipe(child.stdout).close()
            yield  # what was recorded and not announced before it ended
            if self._stopping.is_set():
                return
            if code == FAILED and last_words:
                raise read_last_words(last_words)
            self._judge_death(code)
            self._stopping.wait(self._pauses.next())

    def _start(self) -> subprocess.Popen[bytes]:
        order = Order(
            settings=self._settings,
            directory=self._journal.directory.absolute(),
            limits=self._journal.limits,
            lock_descriptor=self._lock.descriptor,
            parent_pid=os.getpid(),
            log_level=logging.getLogger("atropos_client").getEffectiveLevel(),
        )
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._journal.marks.set("alive_at", time.monotonic_ns())
        child = subprocess.Popen(
            # -P: no file in the working directory may pass for a module.
            [sys.executable, "-P", "-m", "atropos_client.fetcher"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            pass_fds=(self._lock.descriptor,),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        self._lock.name_holders(os.getpid(), child.pid)
        pipe = _pipe(child.stdin)
        with contextlib.suppress(BrokenPipeError):  # its exit code says more
            pipe.write(order.to_line())
        os.set_blocking(pipe.fileno(), False)  # one that does not read must not hold up the trainer
        with self._guard:
            self._child = child
            if self._stopping.is_set():
                pipe.close()
        return child

    def _listen(self, child: subprocess.Popen[bytes]) -> Generator[None, None, bytes]:
        """Yield as `run` does, until it ends; returns its last words."""
        pipe = _pipe(child.stdout).fileno()
        poll = select.poll()  # select() knows no descriptor above 1,023
        poll.register(pipe, select.POLLIN)
        last_words = b""
        while True:
            if poll.poll(_TICK_SECONDS * 1000):
                said = os.read(pipe, 1 << 16)
                if not said:
                    return last_words.strip()
                last_words += said.lstrip()
                self._restarts = 0
                self._pauses.reset()
            yield

    def _judge_death(self, code: int) -> None:
        """Go on with another process, or give up: nobody told this one to end."""
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        marks = self._journal.marks
        if marks.get("polling_since"):  # it has ended with the process
            marks.set("polling_since", 0)
            marks.add("possibly_lost")
            how += " while it was polling, so that a batch is possibly lost"
        self._restarts += 1
        if self._restarts > _MOST_RESTARTS:
            raise FetcherDied(
                f"the fetching process {how}, {self._restarts} times without a batch between; what it had to "
                "say is in the log before this line"
            )
        logger.error("The fetching process %s; starting it again.", how)


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None  # noqa: S101 - for the type checker: each of ours is a pipe
    return stream


def _exit_code(child: subprocess.Popen[bytes]) -> int:
    """Wait for the end of a process that has closed its output, and bring it about if it does not come."""
    try:
        return child.wait(_EXIT_PATIENCE)
    except subprocess.TimeoutExpired:
        logger.warning("Process %d, which fetched, does not end: killing it", child.pid)
        child.kill()
        return child.wait()

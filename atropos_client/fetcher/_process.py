"""The trainer's side: starts the fetching process, watches it, and hands out what it recorded."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from atropos_client._backoff import Backoff
from atropos_client._calls import parse_batch
from atropos_client._heartbeat import Heartbeat
from atropos_client._records import PolledBatch, PollerCounters
from atropos_client._shelf import Closed, NothingInTime, Shelf
from atropos_client.errors import BatchTimeout, FetcherDied, InvalidReply, PollerStopped
from atropos_client.fetcher._lines import LineReader, LineWriter, error_from_message, log_received
from atropos_client.fetcher._settings import FetcherSettings, Order
from atropos_client.journal import Journal
from schemas import BatchReply

logger = logging.getLogger(__name__)

_ROOT: Final = Path(__file__).parent.parent.parent
_TICK_SECONDS: Final = 0.1  # how soon a new served version or step is passed on
_EXPLAIN_SECONDS: Final = 3.0
_STOP_PATIENCE: Final = 5.0  # as BatchPoller's: a live API answers a poll in milliseconds
_KEPT_LOG_LINES: Final = 10
_LONGEST_RESTART_PAUSE: Final = 10.0
_EXIT_PATIENCE: Final = 30.0  # for a process that has closed its output to end
_LONG_LOADING: Final = 1.0  # seconds after which a wait is one for the loading, not for the API


class FetchingProcess:
    """Hands out journaled batches, like a `BatchPoller`: first those that wait in the journal, then new ones.

    Example::

        with Journal.open(directory, wait=settings.farewell + 30) as journal:
            with FetchingProcess(journal, settings, after=checkpoint_batches) as fetcher:
                batch = fetcher.get(timeout=600)      # batch.number is the journal's, batch.tag the version
                journal.settle(batch.number, "trained", step=1)

    A body that is no batch at all is handed out as well, marked as `unreadable`: to be settled as set aside.
    """

    def __init__(
        self,
        journal: Journal,
        settings: FetcherSettings,
        *,
        after: int,
        depth: int = 1,
        served_version: Callable[[], int] = lambda: -1,
        step: Callable[[], int] | None = None,
        prepare: Callable[[BatchReply], object] | None = None,
        max_restarts: int = 3,
    ) -> None:
        """Prepare; nothing is started before `start`.

        Args:
            journal: Opened for writing; stays the caller's, who must not close it before `stop`.
            settings: How to reach and poll the API.
            after: Number of the last batch that the checkpoint counts; the journal is rewound to it.
            depth: Batches recorded beyond the one that the caller works on. 0: fetch only while somebody
                waits in `get`.
            served_version: Asked ten times a second and before each request for a batch; what it last
                returned is recorded with each arrival.
            step: Likewise, for registrations. None: the registration's `starting_step` stays.
            prepare: Called with every batch, in order, in another thread, while the caller may still work on
                an earlier one; its result travels with the batch. So does what it raises.
            max_restarts: How often in a row, without a batch between, the process may end by itself.

        Raises:
            ValueError: If a number makes no sense or the journal cannot be written.
        """
        if depth < 0 or max_restarts < 0:
            raise ValueError(f"depth and max_restarts must be 0 or more, found {depth} and {max_restarts}")
        if journal.lock is None:
            raise ValueError("the journal is open for reading only")
        self._journal = journal
        self._lock_descriptor = journal.lock.descriptor
        self._settings = settings
        self._after = after
        self._depth = depth
        self._served_version = served_version
        self._step = step
        self._prepare = prepare
        self._max_restarts = max_restarts
        self._shelf: Shelf[PolledBatch] = Shelf(depth)
        self._listener = threading.Thread(target=self._run, name="atropos-fetcher", daemon=True)
        self._loader = threading.Thread(target=self._load_all, name="atropos-loader", daemon=True)
        self._loading: tuple[int, float] | None = None  # which batch, since when
        # The process says itself who is late; this is for the case that it says nothing.
        self._heartbeat = Heartbeat(settings.heartbeat, self._explain_silence)

        # Of the listening thread alone.
        self._restarts = 0
        self._pauses = Backoff(first=0.2, longest=_LONGEST_RESTART_PAUSE)
        self._past_counters = PollerCounters()
        self._polling = False  # whether the present process began to poll
        self._log_tail: deque[str] = deque(maxlen=_KEPT_LOG_LINES)

        # Guarded by the condition.
        self._changed = threading.Condition()
        self._child: subprocess.Popen[bytes] | None = None
        self._writer: LineWriter | None = None
        self._told: dict[str, int] = {}
        self._counters = PollerCounters()
        self._numbers: deque[int] = deque()  # recorded, not read yet
        self._last_number = 0
        self._ahead = 0  # recorded, not taken by the caller
        self._asked = 0  # batches that the process was told to fetch and has not
        self._waiting = 0  # callers in `get`
        self._explanations: list[str] = []
        self._stopping = False
        self._ended = False
        self._failure: BaseException | None = None

    # For the caller's threads.

    def start(self) -> Self:
        """Rewind the journal to the checkpoint and start the process.

        Raises:
            JournalMismatch: The journal does not belong to the checkpoint.
            RuntimeError: If it was started before.
        """
        if self._listener.ident is not None:
            raise RuntimeError("the fetching process can be started once")
        report = self._journal.rewind(self._after)
        if report.waiting:
            logger.info(
                "%d batches wait in the journal after batch %d (%d of them trained after the checkpoint).",
                report.waiting,
                self._after,
                report.undone,
            )
        self._last_number = self._after
        self._queue_recorded()
        self._listener.start()
        self._loader.start()
        self._heartbeat.start()
        return self

    def get(self, timeout: float | None = None) -> PolledBatch:
        """Take the next batch; see `BatchPoller.get`.

        Args:
            timeout: Seconds. None: as long as batches may still come.

        Returns:
            The batch; its `number` is the journal's and its `tag` the version that was served on arrival.

        Raises:
            BatchTimeout: If none came in time; the message says who is late.
            PollerStopped: If it was never started, or is stopped and empty.
            AtroposClientError: What ended the fetching, once everything recorded before is taken.
        """
        if self._listener.ident is None:
            raise PollerStopped("the fetching process was not started")
        with self._changed:
            self._waiting += 1
            self._ask()
        try:
            batch = self._shelf.take(timeout)
        except Closed:
            raise PollerStopped("the fetching process was stopped") from None
        except NothingInTime:
            raise BatchTimeout(f"no batch within {timeout:g} s: {self.explain_wait()}") from None
        finally:
            with self._changed:
                self._waiting -= 1
        self._one_less()
        return batch

    def stop(self, timeout: float = _STOP_PATIENCE) -> list[PolledBatch]:
        """Stop fetching. Nothing is lost: what was not taken waits in the journal. May be called twice.

        A poll that is under way after `timeout` seconds goes on in the process, within its farewell.

        Returns:
            An empty list, for the sake of `BatchPoller`'s interface.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            child = self._child
            self._send({"do": "stop"})
        self._heartbeat.stop()
        self._shelf.stop()
        if self._listener.ident is not None:
            self._listener.join(timeout)
            if self._listener.is_alive() and child is not None:
                logger.warning(
                    "A poll is still under way: process %d records what comes, for up to %g s.",
                    child.pid,
                    self._settings.farewell,
                )
            self._loader.join(timeout)
        left = len(self._shelf.drain()) + len(self._numbers)
        if left:
            logger.info("%d fetched batches wait in the journal %s.", left, self._journal.directory)
        return []

    @property
    def counters(self) -> PollerCounters:
        """Everything counted so far, by all processes of this run."""
        with self._changed:
            return self._counters

    @property
    def pid(self) -> int | None:
        """Process id of the fetching process; None: there is none now."""
        with self._changed:
            return self._child.pid if self._child is not None else None

    def explain_wait(self) -> str:
        """Say in one line who is late."""
        return self._explain_here() or self._explain_there() or self._silence()

    def _explain_here(self) -> str | None:
        """What this side knows by itself, if that is why there is no batch."""
        loading = self._loading
        if loading is not None and (seconds := time.monotonic() - loading[1]) > _LONG_LOADING:
            return f"batch {loading[0]} is recorded, and being read and prepared for {seconds:.0f} s"
        if self._failure is not None:
            return f"fetching has ended: {self._failure}"
        return None if self._writer is not None else "the fetching process is being started"

    def _explain_there(self) -> str | None:
        """What the process says; None if it says nothing for a few seconds."""
        with self._changed:
            self._explanations.clear()
            self._send({"do": "explain"})
            self._changed.wait_for(lambda: self._explanations, _EXPLAIN_SECONDS)
            return self._explanations[-1] if self._explanations else None

    def _silence(self) -> str:
        return (
            f"the Atropos API, or process {self.pid} that fetches from it, has not answered for "
            f"{_EXPLAIN_SECONDS:g} s"
        )

    def _explain_silence(self) -> str | None:
        """For the log, while somebody waits: what the process does not say itself."""
        if not self._waiting:
            return None
        here = self._explain_here()
        if here is not None:
            return f"no batch: {here}"
        return None if self._explain_there() is not None else f"no batch: {self._silence()}"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # What to fetch; any thread.

    def _ask(self) -> None:
        """Let the process fetch as many batches as there is room for. The caller holds the condition."""
        room = max(self._depth, 1 if self._waiting else 0)
        while self._writer is not None and self._ahead + self._asked < room:
            self._tell_news()  # what comes is recorded with the version that is served now
            if not self._send({"do": "take"}):
                return
            self._asked += 1

    def _one_less(self) -> None:
        with self._changed:
            self._ahead -= 1
            self._ask()

    def _send(self, message: dict[str, Any]) -> bool:
        return self._writer is not None and self._writer.send(message)

    def _queue_recorded(self) -> None:
        """Queue everything that is in the journal and was not queued before."""
        with self._changed:
            numbers = self._journal.numbers_after(self._last_number)
            if numbers:
                self._last_number = numbers[-1]
                self._numbers.extend(numbers)
                self._ahead += len(numbers)
                self._changed.notify_all()

    # The loading thread: from the journal to the shelf.

    def _load_all(self) -> None:
        try:
            while self._shelf.wait_for_room():
                with self._changed:
                    self._changed.wait_for(lambda: self._numbers or self._ended or self._stopping)
                    if self._stopping or not self._numbers:
                        break
                    number = self._numbers.popleft()
                self._loading = (number, time.monotonic())
                self._load(number)
                self._loading = None
            failure = self._failure
        except BaseException as error:  # noqa: BLE001 - whatever ends this thread is raised in get()
            failure = error
            logger.error("Reading the journal failed: %s", error)  # noqa: TRY400 - get() raises it
        self._shelf.end(failure)

    def _load(self, number: int) -> None:
        batch = self._journal.read(number)
        unreadable = None
        try:
            reply = parse_batch(batch.body)
        except InvalidReply as error:
            reply, unreadable = BatchReply(batch=None), str(error)
        entry = batch.entry
        prepared, failure = self._try_to_prepare(reply) if unreadable is None else (None, None)
        self._shelf.put(
            PolledBatch(
                number=number,
                reply=reply,
                body=batch.body,
                tag=entry.served_version,
                received_at=entry.received_at,
                prepared=prepared,
                failure=failure,
                unreadable=unreadable,
            )
        )

    def _try_to_prepare(self, reply: BatchReply) -> tuple[object, Exception | None]:
        if self._prepare is None:
            return None, None
        try:
            return self._prepare(reply), None
        except Exception as error:  # noqa: BLE001 - travels with its batch, for its turn
            return None, error

    # The listening thread: one process after the other.

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            while failure is None and not self._stopping:
                failure = self._live_through_one()
                if failure is None and not self._stopping:
                    self._pause_before_restart()
        except BaseException as error:  # noqa: BLE001 - whatever ends this thread is raised in get()
            failure = error
            logger.error("Watching the fetching process failed: %s", error)  # noqa: TRY400 - get() raises it
        with self._changed:
            self._failure = failure
            self._ended = True
            self._changed.notify_all()

    def _live_through_one(self) -> BaseException | None:
        """Start a process and serve it until it ends. Returns what ends the fetching for good, if it does."""
        self._polling = False
        child = self._spawn()
        failure: BaseException | None = None
        log_thread = threading.Thread(target=self._relay_log, args=(child,), daemon=True)
        log_thread.start()
        assert child.stdin is not None  # noqa: S101 - for the type checker
        assert child.stdout is not None  # noqa: S101
        reader = LineReader(child.stdout.fileno())
        while (lines := reader.read(_TICK_SECONDS)) is not None:
            for line in lines:
                failure = self._hear(json.loads(line)) or failure
            self._tell_news()
        code = _exit_code(child)
        log_thread.join(_EXIT_PATIENCE)
        with self._changed:
            self._child = self._writer = None
            asked, self._asked = self._asked, 0
            self._past_counters = self._counters
        for pipe in (child.stdin, child.stdout, child.stderr):
            if pipe is not None:
                pipe.close()
        if not self._stopping:
            self._queue_recorded()  # what was recorded and not announced before it ended
        if failure is None and not self._stopping:
            failure = self._judge_death(code, asked=asked)
        return failure

    def _spawn(self) -> subprocess.Popen[bytes]:
        version = self._served_version()
        order = Order(
            settings=self._settings,
            directory=self._journal.directory.absolute(),
            limits=self._journal.limits,
            lock_descriptor=self._lock_descriptor,
            parent_pid=os.getpid(),
            log_level=logging.getLogger("atropos_client").getEffectiveLevel(),
            served_version=version,
        )
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        child = subprocess.Popen(
            # -P: no file in the working directory may pass for a module.
            [sys.executable, "-P", "-m", "atropos_client.fetcher"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            pass_fds=(self._lock_descriptor,),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        if self._journal.lock is not None:
            self._journal.lock.name_holders(os.getpid(), child.pid)
        assert child.stdin is not None  # noqa: S101 - for the type checker
        writer = LineWriter(child.stdin.fileno())
        writer.send(order.to_line())
        with self._changed:
            self._child, self._writer = child, writer
            self._told = {"version": version}
            if self._stopping:
                self._send({"do": "stop"})
            self._ask()
        return child

    def _hear(self, message: dict[str, Any]) -> BaseException | None:
        """Take in one message; returns the failure that it reports, if it does."""
        with self._changed:
            self._counters = _sum(self._past_counters, message["counters"])
            match message["event"]:
                case "started":
                    self._polling = True
                case "recorded":
                    self._restarts = 0
                    self._pauses.reset()
                    if not self._stopping:  # the journal may be closed then
                        self._queue_recorded()
                case "taken":
                    self._asked -= 1
                    self._ask()
                case "explained":
                    self._explanations.append(str(message["text"]))
                    self._changed.notify_all()
                case "failed":
                    return error_from_message(message["error"])
        return None

    def _tell_news(self) -> None:
        """Pass on a changed version or step."""
        with self._changed:  # asked under the condition: no older answer may overtake a newer one
            news = {"version": self._served_version()}
            if self._step is not None:
                news["step"] = self._step()
            for name, value in news.items():
                if self._told.get(name) != value and self._send({"do": name, "value": value}):
                    self._told[name] = value

    def _relay_log(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stderr is not None  # noqa: S101 - for the type checker
        reader = LineReader(child.stderr.fileno())
        while (lines := reader.read(_LONGEST_RESTART_PAUSE)) is not None:
            self._log_tail.extend(log_received(lines, logger))

    def _judge_death(self, code: int, *, asked: int) -> BaseException | None:
        """Nobody told the process to end. Go on with another one, or give up."""
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        lost = ""
        if asked and self._polling:
            # A poll that was under way has ended with it.
            with self._changed:
                self._counters = _sum(self._counters, {"possibly_lost": 1})
                self._past_counters = self._counters
            lost = " while it was polling, so that a batch is possibly lost"
        self._restarts += 1
        if self._restarts <= self._max_restarts:
            logger.error("The fetching process %s%s; starting it again.", how, lost)
            return None
        last = "\n  ".join(self._log_tail) or "(it logged nothing)"
        return FetcherDied(
            f"the fetching process {how}{lost}, {self._restarts} times without a batch between. Its last log "
            f"lines:\n  {last}"
        )

    def _pause_before_restart(self) -> None:
        end = time.monotonic() + self._pauses.next()
        with self._changed:
            self._changed.wait_for(lambda: self._stopping, max(0.0, end - time.monotonic()))


def _exit_code(child: subprocess.Popen[bytes]) -> int:
    """Wait for the end of a process that has closed its output, and bring it about if it does not come."""
    try:
        return child.wait(_EXIT_PATIENCE)
    except subprocess.TimeoutExpired:
        logger.warning("Process %d, which fetched, does not end: killing it", child.pid)
        child.kill()
        return child.wait()


def _sum(past: PollerCounters, more: dict[str, int]) -> PollerCounters:
    total = {name: getattr(past, name) + count for name, count in more.items()}
    return dataclasses.replace(past, **total)

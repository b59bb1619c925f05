"""Hands out what the fetching process recorded, in order, each batch read and prepared once."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any, Final, Self

from atropos_client._reading import claims_batch, parse_batch
from atropos_client.clock import running_time
from atropos_client.errors import FetcherStopped, InvalidReply, UnreadableBatch
from atropos_client.fetcher._lateness import Lateness
from atropos_client.fetcher._process import FetchingProcess
from atropos_client.fetcher._records import FetchCounters, FetchedBatch, count_groups, warn_of_rejected
from atropos_client.fetcher._settings import FetcherSettings
from atropos_client.journal import COUNTED, Journal
from schemas import BatchReply, count_of

logger = logging.getLogger(__name__)

STOP_PATIENCE: Final = 5.0
"""Seconds that a poll under way is given to end; a live API answers a poll in milliseconds."""


class Fetcher:
    """Hands out journaled batches: first those that wait in the journal, then new ones.

    Example::

        with Journal.open(directory, wait=settings.farewell + 30) as journal:
            with Fetcher(journal, settings, after=checkpoint_batches) as fetcher:
                batch = fetcher.get(timeout=600)      # batch.number is the journal's
                journal.settle(batch.number, "trained", step=1)

    A body that is no batch at all is handed out as well, marked as `unreadable`: to be settled as set aside.
    Environments throttle themselves on the server's queue, so that every batch fetched early is staleness
    that they do not see: keep `depth` small.
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
    ) -> None:
        """Prepare; nothing is started before `start`.

        Args:
            journal: Opened for writing; stays the caller's, who must not close it before `stop`.
            settings: How to reach and poll the API.
            after: Number of the last batch that the checkpoint counts; the journal is rewound to it.
            depth: Batches recorded beyond the one that the caller works on. 0: fetch only while somebody
                waits in `get`.
            served_version: Asked ten times a second and whenever a batch is wanted; what it last returned is
                recorded with each arrival.
            step: Likewise, for registrations. None: the registration's `starting_step` stays.
            prepare: Called with every batch, in order, in another thread, while the caller may still work on
                an earlier one; its result travels with the batch. So does what it raises.

        Raises:
            ValueError: If the journal cannot be written.
        """
        self._journal = journal
        self._settings = settings
        self._after = after
        self._depth = depth
        self._served_version = served_version
        self._step = step or (lambda: settings.registration.starting_step)
        self._prepare = prepare
        self._process = self._make_process()
        self._listener = threading.Thread(target=self._listen, name="atropos-fetcher", daemon=True)
        self._loader = threading.Thread(target=self._load_all, name="atropos-loader", daemon=True)
        self._lateness = Lateness(settings, journal.marks, self._process)

        # Of the loading thread alone.
        self._new_after = 0  # number of the last batch that lay in the journal at the start
        self._unreadable_since: float | None = None

        # Guarded by the condition.
        self._changed = threading.Condition()
        self._told: tuple[int, int, int] | None = None  # the last number to fetch, version, step
        self._numbers: deque[int] = deque()  # recorded, not read yet
        self._last_number = after
        self._ready: deque[FetchedBatch[Any]] = deque()  # read, not taken yet
        self._taken = after  # number of the last batch that the caller took
        self._waiting = 0  # callers in `get`
        self._read_counts: Counter[str] = Counter()  # of new batches, when they were read
        self._counters: FetchCounters | None = None  # when it was stopped: the journal may be closed then
        self._stopping = False
        self._recorded_all = False  # the process will record no more
        self._ended = False  # the loader will read no more

    def _make_process(self) -> FetchingProcess:
        return FetchingProcess(self._journal, self._settings)

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
                "To be trained from the journal, after batch %d: %s (%d trained after the checkpoint).",
                self._after,
                count_of(report.waiting, "batch"),
                report.undone,
            )
        self._new_after = self._journal.last_number
        self._journal.marks.begin_fetching(possibly_lost=self._journal.possibly_lost)
        self._look()
        self._listener.start()
        self._loader.start()
        self._lateness.start_heartbeat()
        return self

    def get(self, timeout: float | None = None) -> FetchedBatch[Any] | None:
        """Take the next batch, waiting for it if there is none.

        Args:
            timeout: Seconds. None: as long as batches may still come.

        Returns:
            The batch; None if none came in time.

        Raises:
            FetcherStopped: If it was never started, or is stopped.
            AtroposClientError: What ended the fetching, once everything recorded before is taken.
        """
        if self._listener.ident is None:
            raise FetcherStopped("the fetching process was not started")
        with self._changed, self._waiting_for_one():
            self._changed.wait_for(lambda: self._ready or self._ended, timeout)
            if self._ready:
                batch = self._ready.popleft()
                self._taken = batch.number
                return batch
            if self._lateness.failure is not None:
                raise self._lateness.failure
            if self._ended:
                raise FetcherStopped("the fetching process was stopped")
        return None

    def stop(self, timeout: float = STOP_PATIENCE) -> None:
        """Stop fetching. Nothing is lost: what was not taken waits in the journal. May be called twice.

        A poll that is under way after `timeout` seconds goes on in the process, within its farewell.
        """
        if self._counters is not None:
            return
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        pid = self._process.pid
        self._process.stop()
        self._lateness.stop_heartbeat()
        if self._listener.ident is not None:
            self._listener.join(timeout)
            if self._listener.is_alive():
                logger.warning(
                    "A poll is still under way: process %s records what comes, for up to %g s.",
                    pid,
                    self._settings.farewell,
                )
            self._loader.join(timeout)
        left = len(self._ready) + len(self._numbers)
        if left:
            logger.info("Left in the journal %s: %s.", self._journal.directory, count_of(left, "batch"))
        with self._changed:
            self._counters = self._count_all()
            self._ready.clear()
            self._numbers.clear()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def counters(self) -> FetchCounters:
        """Everything counted so far, by all processes of this run."""
        with self._changed:
            return self._counters or self._count_all()

    def _count_all(self) -> FetchCounters:
        counted = Counter({name: self._journal.marks.get(name) for name in COUNTED})
        return FetchCounters(**(counted + self._read_counts))

    @property
    def pid(self) -> int | None:
        """Process id of the fetching process; None: there is none now."""
        return self._process.pid

    # What to fetch; any thread that holds the condition.

    @contextlib.contextmanager
    def _waiting_for_one(self) -> Iterator[None]:
        self._waiting += 1
        self._tell()
        try:
            yield
        finally:
            self._waiting -= 1
            self._tell()

    def _up_to(self) -> int:
        """Return the number of the last batch to fetch, read and prepare."""
        return self._taken + max(self._depth, 1 if self._waiting else 0)

    def _tell(self) -> None:
        """Note in the journal's marks what is wanted now, if that has changed."""
        wanted = (self._up_to(), self._served_version(), self._step())
        if wanted != self._told and not self._stopping:
            marks = self._journal.marks
            for name, value in zip(("step", "version", "up_to"), reversed(wanted), strict=True):
                marks.set(name, value)
            self._told = wanted
            self._process.wake()
            self._changed.notify_all()
        if self._last_number >= self._up_to():
            self._lateness.wanting_since = None
        elif self._lateness.wanting_since is None:
            self._lateness.wanting_since = running_time()

    def _look(self) -> None:
        """Queue everything that is in the journal and was not queued before."""
        with self._changed:
            if self._stopping:  # the journal may be closed
                return
            numbers = self._journal.numbers_after(self._last_number)
            if numbers:
                self._last_number = numbers[-1]
                self._lateness.wanting_since = None
                self._numbers.extend(numbers)
                self._changed.notify_all()
            self._tell()

    # The listening thread.

    def _listen(self) -> None:
        failure: BaseException | None = None
        try:
            for _ in self._process.run():
                self._look()
        except BaseException as error:  # noqa: BLE001 - whatever ends this thread is raised in get()
            failure = error
            logger.error("Fetching ends: %s", error)  # noqa: TRY400 - get() raises it with its trace
        with self._changed:
            self._lateness.failure = failure
            self._recorded_all = True
            self._changed.notify_all()

    # The loading thread.

    def _load_all(self) -> None:
        failure = None
        try:
            while (number := self._next_to_load()) is not None:
                batch = self._load(number)
                with self._changed:
                    self._lateness.loading = None
                    self._ready.append(batch)
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - whatever ends this thread is raised in get()
            failure = error
            logger.error("Reading the journal failed: %s", error)  # noqa: TRY400 - get() raises it
        with self._changed:
            self._lateness.failure = failure or self._lateness.failure
            self._ended = True
            self._changed.notify_all()

    def _next_to_load(self) -> int | None:
        """Wait for a batch that is recorded and wanted; None: there will be none."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._stopping
                    or (self._recorded_all and not self._numbers)
                    or (self._numbers and self._numbers[0] <= self._up_to())
                )
            )
            if self._stopping or not self._numbers:
                return None
            number = self._numbers.popleft()
            self._lateness.loading = (number, time.monotonic())
            return number

    def _load(self, number: int) -> FetchedBatch[Any]:
        batch = self._journal.read(number)
        unreadable = batch.entry.skip_reason
        reply, prepared, failure = BatchReply(batch=None), None, None
        if unreadable is None:
            with self._journal.in_hand(number):
                try:
                    reply = parse_batch(batch.body)
                except InvalidReply as error:
                    unreadable = str(error)
                    self._require_readable_ones(error)
                else:
                    self._unreadable_since = None
                    prepared, failure = self._try_to_prepare(reply)
                    warn_of_rejected(reply, number)
            if number > self._new_after:
                self._count(reply, unreadable is not None and claims_batch(batch.body))
        return FetchedBatch(
            number=number,
            reply=reply,
            body=batch.body,
            served_version=batch.entry.served_version,
            prepared=prepared,
            failure=failure,
            unreadable=unreadable,
        )

    def _try_to_prepare(self, reply: BatchReply) -> tuple[object, Exception | None]:
        if self._prepare is None:
            return None, None
        try:
            return self._prepare(reply), None
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - travels with its batch, for its turn
            return None, error

    def _require_readable_ones(self, error: InvalidReply) -> None:
        """Give up an API whose batches could not be read for as long as it is given in all."""
        now = running_time()
        self._unreadable_since = self._unreadable_since or now
        if now - self._unreadable_since > self._settings.patience:
            raise UnreadableBatch(
                f"no batch could be read for {self._settings.patience:g} s: {error}"
            ) from error

    def _count(self, reply: BatchReply, unreadable: bool) -> None:
        """Count what a new batch holds. What does not claim to be one was counted by the process."""
        counts = count_groups(reply)
        with self._changed:
            self._read_counts.update(**counts, unreadable=int(unreadable))
            if counts["groups"]:
                self._lateness.group_size = counts["sequences"] / counts["groups"]

    # Who is late.

    def explain_wait(self) -> str:
        """Say in one line who is late. Asks the API for its status if that is likely to answer."""
        return self._lateness.explain()

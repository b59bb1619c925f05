"""Fetching batches in the background, a bounded number ahead, through restarts and failures of the API.

One thread registers, polls, records, parses, has the batch prepared, and hands over. It decides nothing about
training: batches come out in the order of arrival, exactly once, each with the tag that was true when it
came.

What it survives: an API that is down, restarts, or was reset (it registers again), replies that are lost or
broken (counted, logged, polled on). What ends it: credentials or an address that never worked, an API that
has answered nothing properly for `patience` seconds, and a journal that cannot record.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from atropos_client._backoff import Backoff
from atropos_client._calls import parse_batch
from atropos_client._client import AtroposClient
from atropos_client._exchange import possibly_lost
from atropos_client._heartbeat import Heartbeat, WaitFacts, explain_wait
from atropos_client._records import PolledBatch, PollerCounters
from atropos_client._retry import is_transient
from atropos_client._shelf import Closed, NothingInTime, Shelf
from atropos_client.errors import (
    AtroposClientError,
    BatchNotRecorded,
    BatchPossiblyLost,
    BatchTimeout,
    ErrorStatus,
    InvalidReply,
    JournalError,
    PollerStopped,
    UnreadableBatch,
)
from schemas import BatchReply, Registration, StatusReply

logger = logging.getLogger(__name__)

_EMPTY_REPLY: Final = b'{"batch":null}'  # what the API sends, byte for byte; nothing worth recording
_STOP_PATIENCE: Final = 5.0  # seconds; a live API answers a poll in milliseconds


class BatchPoller:
    """Polls the API in a thread and hands out batches.

    Example::

        with BatchPoller(client, registration, tag=lambda: publisher.served_version) as poller:
            batch = poller.get(timeout=600)

    Environments throttle themselves on the server's queue, so that every batch fetched early is staleness
    that they do not see: keep `depth` small.
    """

    def __init__(
        self,
        client: AtroposClient,
        registration: Registration | Callable[[], Registration],
        *,
        depth: int = 1,
        on_body: Callable[[bytes], None] | None = None,
        before_poll: Callable[[], None] | None = None,
        tag: Callable[[], object] | None = None,
        prepare: Callable[[BatchReply], object] | None = None,
        first_pause: float = 0.1,
        longest_pause: float = 1.0,
        longest_failure_pause: float = 15.0,
        heartbeat: float = 60.0,
        patience: float = 900.0,
    ) -> None:
        """Prepare a poller; nothing is sent before `start`.

        Args:
            client: Stays the caller's: the poller does not close it.
            registration: How to register; a callable is asked anew each time, so that a registration after a
                restart of the API can carry the current step.
            depth: Batches held ready beyond the one that the caller works on. 0: fetch only while somebody
                waits in `get`.
            on_body: Called with the body of every poll that is not empty, before it is parsed: the place of a
                durable journal. If it raises, the poller ends and `get` raises BatchNotRecorded.
            before_poll: Called before every poll, in the poller's thread. If it raises a JournalError (say,
                JournalFull), no batch is taken from the API, the poller ends, and `get` raises it.
            tag: Called on arrival of every batch, in the poller's thread; its result travels with the batch.
            prepare: Called with every batch, in order, in the poller's thread, while the caller may still
                work on an earlier one; its result travels with the batch. So does what it raises.
            first_pause: Seconds between polls when the API has no data; doubles.
            longest_pause: Seconds that this pause never exceeds.
            longest_failure_pause: Seconds that the pause after failures never exceeds, whatever Retry-After a
                server sends.
            heartbeat: Seconds between two log lines that say who is late.
            patience: Seconds without any proper answer of the API after which the poller gives up.

        Raises:
            ValueError: If a number makes no sense.
        """
        if depth < 0:
            raise ValueError(f"depth must be 0 or more, found {depth}")
        if not heartbeat > 0 or not patience > 0:
            raise ValueError(f"heartbeat and patience must be positive, found {heartbeat} and {patience}")
        self._client = client
        self._registration = registration if callable(registration) else lambda: registration
        self._on_body = on_body
        self._before_poll = before_poll
        self._tag = tag
        self._prepare = prepare
        self._patience = patience
        self._idle = Backoff(first=first_pause, longest=longest_pause)
        self._longest_failure_pause = max(first_pause, longest_failure_pause)
        self._failing = Backoff(first=first_pause, longest=self._longest_failure_pause)
        self._shelf: Shelf[PolledBatch] = Shelf(depth)
        self._thread = threading.Thread(target=self._run, name="atropos-poller", daemon=True)
        self._heartbeat = Heartbeat(heartbeat, self._late_line)
        self._heartbeat_seconds = heartbeat

        # Of the polling thread alone.
        self._registered = False
        self._in_doubt = False  # after a lost batch: does the API still know us?
        self._has_worked = False
        self._failing_since: float | None = None

        # Written by the polling thread, read by all; guarded by the lock.
        self._lock = threading.Lock()
        self._counters = PollerCounters()
        self._wanting_since: float | None = None  # None: enough is ready, nobody is late
        self._in_flight_since: float | None = None
        self._trouble: str | None = None
        self._batch_size = 0
        self._group_size: float | None = None

    # For the caller's threads.

    def start(self) -> Self:
        """Start polling.

        Raises:
            RuntimeError: If it was started before.
        """
        self._thread.start()
        self._heartbeat.start()
        return self

    def get(self, timeout: float | None = None) -> PolledBatch:
        """Take the next batch, waiting for it if there is none.

        Args:
            timeout: Seconds. None: as long as the poller lives.

        Raises:
            BatchTimeout: If none came in time; the message says who is late.
            PollerStopped: If the poller was never started, or is stopped and empty.
            BaseException: What the polling thread died of, once everything fetched before is taken.
        """
        if self._thread.ident is None:
            raise PollerStopped("the poller was not started")
        try:
            return self._shelf.take(timeout)
        except Closed:
            raise PollerStopped("the poller was stopped and has no batch left") from None
        except NothingInTime:
            raise BatchTimeout(f"no batch within {timeout:g} s: {self.explain_wait()}") from None

    def stop(self, timeout: float = _STOP_PATIENCE) -> list[PolledBatch]:
        """Stop polling and return the batches that were fetched and never taken. May be called twice.

        A poll under way is given `timeout` seconds to finish, because cutting it off could cost a batch.
        """
        self._shelf.stop()
        self._heartbeat.stop()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        with self._lock:
            in_flight = self._in_flight_since is not None
        if in_flight:
            # The thread is a daemon, blocked in a read. Should its batch still come, on_body records it.
            self._count(possibly_lost=1)
            logger.warning("Stopped while GET /batch had no reply yet: a batch is possibly lost.")
        left = self._shelf.drain()
        if left:
            logger.warning("The poller was stopped with %d fetched batches that nobody took.", len(left))
        return left

    @property
    def counters(self) -> PollerCounters:
        """A snapshot of everything counted so far."""
        with self._lock:
            return self._counters

    def explain_wait(self) -> str:
        """Say in one line who is late. Asks the API for its status if that is likely to answer."""
        facts = self._facts()
        if facts.trouble is None and (facts.in_flight is None or facts.in_flight < 1):
            facts = dataclasses.replace(facts, status=self._ask_status())
        return explain_wait(facts)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # The polling thread.

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            going_on = self._shelf.pause(0.0)
            # The first poll is sent whatever the depth: before it no environment can register.
            while going_on:
                self._want(True)
                going_on = self._shelf.pause(self._poll_or_explain())
                if going_on and self._has_worked and not self._shelf.has_room():
                    self._want(False)
                    going_on = self._shelf.wait_for_room()
        except BaseException as error:  # noqa: BLE001 - whatever ends this thread is raised in get()
            failure = error
            logger.error("The batch poller ends: %s", error)  # noqa: TRY400 - get() raises it with its trace
        finally:
            self._want(False)
            self._heartbeat.stop()
            self._shelf.end(failure)

    def _want(self, wanting: bool) -> None:
        """Note whether we are polling for data, and since when."""
        with self._lock:
            if not wanting:
                self._wanting_since = None
            elif self._wanting_since is None:
                self._wanting_since = time.monotonic()

    def _poll_or_explain(self) -> float:
        """Poll once, deal with every failure that polling on can mend, and return the pause in seconds."""
        try:
            came = self._poll()
        except (BatchNotRecorded, JournalError):
            raise
        except AtroposClientError as error:
            self._tolerate(error)
            pause = self._failing.next()
            asked_for = error.retry_after if isinstance(error, ErrorStatus) else 0.0
            return max(pause, min(asked_for, self._longest_failure_pause))
        self._has_worked = True
        self._failing_since = None
        self._failing.reset()
        with self._lock:
            self._trouble = None
        if came:
            self._idle.reset()
            return 0.0
        return self._idle.next()

    def _poll(self) -> bool:
        """Register if needed, then ask once. True: a batch came."""
        if self._in_doubt:
            self._registered = self._client.info().registered
            self._in_doubt = False
        if not self._registered:
            self._register()
        if self._before_poll is not None:
            self._before_poll()
        self._count(polls=1)
        with self._lock:
            self._in_flight_since = time.monotonic()
        try:
            body = self._client.fetch_batch_body()
        finally:
            with self._lock:
                self._in_flight_since = None
        reply = self._record_and_parse(body)
        if reply.state == "unregistered":
            logger.warning(
                "The Atropos API at %s has forgotten us: registering again.", self._client.base_url
            )
            self._registered = False
        elif reply.state == "waiting":
            self._count(empty_replies=1)
        else:
            self._hand_over(reply, body)
        return reply.state == "ready"

    def _register(self) -> None:
        registration = self._registration()
        self._batch_size = registration.batch_size
        self._client.register(registration)
        self._registered = True
        again = self.counters.registrations > 0
        self._count(registrations=1, re_registrations=int(again))
        logger.info(
            "Registered with the Atropos API at %s%s.", self._client.base_url, " again" if again else ""
        )
        info = self._client.info()
        if (info.batch_size, info.max_token_len) != (registration.batch_size, registration.max_token_len):
            self._batch_size = info.batch_size
            logger.warning(
                "The Atropos API keeps an earlier registration: batches of %d sequences of at most %d "
                "tokens, not %d and %d. Restart it (or call reset_data) to change that.",
                info.batch_size,
                info.max_token_len,
                registration.batch_size,
                registration.max_token_len,
            )

    def _record_and_parse(self, body: bytes) -> BatchReply:
        if not body:
            raise possibly_lost(self._of_batch(InvalidReply("the reply is empty")))
        if self._on_body is not None and body != _EMPTY_REPLY:
            try:
                self._on_body(body)
            except BatchNotRecorded:
                raise
            except Exception as error:
                raise BatchNotRecorded(
                    f"the journal could not record a batch of {len(body)} bytes: {error}", body=body
                ) from error
        try:
            return parse_batch(body)
        except InvalidReply as error:
            self._hand_over_unreadable(body, str(error))
            raise self._of_batch(UnreadableBatch(f"set aside whole: {error}")) from error

    def _of_batch(self, error: InvalidReply) -> InvalidReply:
        """Tell an error which request it is about."""
        error.method, error.url = "GET", f"{self._client.base_url}/batch"
        return error

    def _hand_over_unreadable(self, body: bytes, reason: str) -> None:
        """Whole, and no batch: the batch that it may have been is in it, so nothing is lost."""
        self._has_worked = True  # the API is there, and what was handed over needs room
        self._shelf.put(
            PolledBatch(
                number=self.counters.batches,
                reply=BatchReply(batch=None),
                body=body,
                tag=self._tag() if self._tag is not None else None,
                received_at=time.time(),
                unreadable=reason,
            )
        )

    def _hand_over(self, reply: BatchReply, body: bytes) -> None:
        received_at = time.time()
        tag = self._tag() if self._tag is not None else None
        groups, rejected = reply.groups, reply.rejected
        sequences = sum(group.sequence_count for group in groups)
        self._count(
            batches=1,
            groups=len(groups),
            sequences=sequences,
            rejected_groups=len(rejected),
            binary_mask_groups=sum(group.masks_were_binary for group in groups),
            bytes=len(body),
        )
        number = self.counters.batches
        if rejected:
            first = rejected[0]
            logger.warning(
                "Batch %d: %d of %d groups cannot be trained on; the first is group %d of environment %s: %s",
                number,
                len(rejected),
                len(groups) + len(rejected),
                first.index,
                first.env_id,
                first.reason,
            )
        with self._lock:
            self._group_size = sequences / len(groups) if groups else self._group_size
            self._wanting_since = None
        prepared, failure = self._try_to_prepare(reply)
        self._shelf.put(
            PolledBatch(
                number=number,
                reply=reply,
                body=body,
                tag=tag,
                received_at=received_at,
                prepared=prepared,
                failure=failure,
            )
        )

    def _try_to_prepare(self, reply: BatchReply) -> tuple[object, Exception | None]:
        if self._prepare is None:
            return None, None
        try:
            return self._prepare(reply), None
        except Exception as error:  # noqa: BLE001 - travels with its batch, which must not be lost
            return None, error

    def _tolerate(self, error: AtroposClientError) -> None:
        """Log and count a failure; raise it if polling on cannot mend it."""
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        with self._lock:
            self._trouble = str(error)
        if isinstance(error, BatchPossiblyLost):
            self._count(possibly_lost=1)
            self._in_doubt = True  # an API that was reset answers 500 until somebody registers
            logger.error("%s (%d so far)", error, self.counters.possibly_lost)
        elif isinstance(error, UnreadableBatch):
            self._count(unreadable=1)
            self._in_doubt = True
            logger.error("%s (%d so far)", error, self.counters.unreadable)
        else:
            self._count(failed_requests=1)
            # What never worked is a wrong address or token; what once worked may be a restart behind a proxy.
            if not self._has_worked and not is_transient(error):
                raise error
            logger.warning("Polling on after: %s", error)
        if now - self._failing_since > self._patience:
            raise error

    # Facts for the heartbeat; any thread.

    def _facts(self) -> WaitFacts:
        now = time.monotonic()
        with self._lock:
            return WaitFacts(
                url=self._client.base_url,
                waited=0.0 if self._wanting_since is None else now - self._wanting_since,
                batch_size=self._batch_size,
                batches=self._counters.batches,
                group_size=self._group_size,
                in_flight=None if self._in_flight_since is None else now - self._in_flight_since,
                trouble=self._trouble,
                status=None,
            )

    def _late_line(self) -> str | None:
        with self._lock:
            since = self._wanting_since
        if since is None or time.monotonic() - since < self._heartbeat_seconds:
            return None
        return self.explain_wait()

    def _ask_status(self) -> StatusReply | None:
        try:
            return self._client.status()
        except AtroposClientError:
            return None  # the line then says that there was no answer

    def _count(self, **more: int) -> None:
        with self._lock:
            now = {name: getattr(self._counters, name) + n for name, n in more.items()}
            self._counters = dataclasses.replace(self._counters, **now)

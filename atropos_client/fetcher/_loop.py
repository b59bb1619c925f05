"""Registers, polls, records what comes, and lives through failures of the API.

What it survives: an API that is down, restarts, or was reset (it registers again), replies that are lost or
broken (counted, logged, polled on). What ends it: credentials or an address that never worked, an API that
has answered nothing properly for `patience` seconds, and a journal that cannot record.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from atropos_client._client import AtroposClient
from atropos_client._reading import claims_batch, parse_batch
from atropos_client._reply import possibly_lost
from atropos_client._retry import is_transient
from atropos_client.backoff import Backoff
from atropos_client.clock import running_time
from atropos_client.errors import (
    AtroposClientError,
    BatchNotRecorded,
    BatchPossiblyLost,
    ErrorStatus,
    InvalidReply,
    JournalError,
    UnreadableBatch,
)
from atropos_client.fetcher._settings import FetcherSettings
from atropos_client.journal import Journal
from schemas import InfoReply, Registration

logger = logging.getLogger(__name__)


class FetchLoop:
    """Polls while the journal ends before the batch that the trainer wants, and records what comes.

    What is wanted, and what is counted, stands in the journal's marks.
    """

    def __init__(
        self,
        journal: Journal,
        client: AtroposClient,
        settings: FetcherSettings,
        *,
        recorded: Callable[[], None],
    ) -> None:
        """Prepare; nothing is sent before `run`. `recorded` is called when the journal has one more batch."""
        self._journal = journal
        self._marks = journal.marks
        self._client = client
        self._settings = settings
        self._recorded = recorded
        self._idle = Backoff(first=settings.first_pause, longest=settings.longest_pause)
        self._longest_failure_pause = max(settings.first_pause, settings.longest_failure_pause)
        self._failing = Backoff(first=settings.first_pause, longest=self._longest_failure_pause)
        self._last_number = journal.last_number
        self._registered = False
        self._in_doubt = False  # after a lost batch: does the API still know us?
        self._has_worked = False
        self._failing_since: float | None = None
        self._changed = threading.Condition()
        self._stopping = False

    def run(self) -> None:
        """Poll until `stop`.

        Raises:
            AtroposClientError: What polling on cannot mend.
        """
        # The first poll is sent whether there is room or not: before it no environment can register.
        while not self._stopping:
            self._wait(lambda: False, self._poll_or_tolerate())
            if self._has_worked:
                self._wait(self._has_room, None)

    def wake(self) -> None:
        """Look again at what is wanted; from any thread."""
        with self._changed:
            self._changed.notify_all()

    def stop(self) -> None:
        """Let the poll under way be the last; from any thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def _has_room(self) -> bool:
        return self._last_number < self._marks.get("up_to")

    def _wait(self, until: Callable[[], bool], seconds: float | None) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or until(), seconds)

    def _poll_or_tolerate(self) -> float:
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
        if self._failing_since is not None:
            self._failing_since = None
            self._marks.trouble = None
        self._failing.reset()
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
        self._journal.require_room()
        self._marks.add("polls")
        self._marks.set("polling_since", time.monotonic_ns())
        try:
            body = self._client.fetch_batch()
            if not body:
                raise possibly_lost(self._of_batch(InvalidReply("the reply is empty")))
            return self._take(body)
        finally:  # the reply, if there was one, is recorded
            self._marks.set("polling_since", 0)

    def _take(self, body: bytes) -> bool:
        """Record a reply, unless it certainly holds no batch. True: it is one."""
        if not claims_batch(body):  # what does is read by the trainer alone
            try:
                reply = parse_batch(body)
            except InvalidReply as error:
                # The batch that it may have been is in what was kept, so nothing is lost.
                self._record(body)
                self._has_worked = True  # the API is there, and what was kept needs room
                raise self._of_batch(UnreadableBatch(f"set aside whole: {error}")) from error
            if reply.state == "unregistered":
                logger.warning(
                    "The Atropos API at %s has forgotten us: registering again.", self._client.base_url
                )
                self._registered = False
            elif reply.state == "waiting":
                self._marks.add("empty_replies")
            if reply.state != "ready":
                return False
        self._marks.add("batches")
        self._marks.add("bytes", len(body))
        self._record(body)
        return True

    def _record(self, body: bytes) -> None:
        self._last_number = self._journal.append(body, self._marks.get("version"))
        if self._stopping:
            logger.info("Recorded batch %d, which was on its way when the trainer ended.", self._last_number)
        self._recorded()

    def _of_batch(self, error: InvalidReply) -> InvalidReply:
        """Tell an error which request it is about."""
        error.method, error.url = "GET", f"{self._client.base_url}/batch"
        return error

    def _register(self) -> None:
        registration = self._settings.registration.model_copy(
            update={"starting_step": self._marks.get("step")}
        )
        self._client.register(registration)
        info = self._client.info()
        if not info.registered:
            info = self._register_after_reset(registration)
        self._registered = True
        again = self._marks.add("registrations") > 1
        self._marks.add("re_registrations", int(again))
        logger.info(
            "Registered with the Atropos API at %s%s.", self._client.base_url, " again" if again else ""
        )
        if (info.batch_size, info.max_token_len) != (registration.batch_size, registration.max_token_len):
            logger.warning(
                "The Atropos API keeps an earlier registration: batches of %d sequences of at most %d "
                "tokens, not %d and %d. Restart it (or call reset_data) to change that.",
                info.batch_size,
                info.max_token_len,
                registration.batch_size,
                registration.max_token_len,
            )

    def _register_after_reset(self, registration: Registration) -> InfoReply:
        """Reset an API that accepts a registration without taking it, and register again.

        The server takes its queue as the sign that a trainer has registered. An environment that was not told
        of a restart and pushes a group first makes that queue, and from then on registrations are ignored.
        """
        logger.warning(
            "The Atropos API at %s ignores registrations, because a group was pushed to it before the first "
            "of them. It is reset; the groups in it, which it would never hand out, are lost.",
            self._client.base_url,
        )
        self._client.reset_data()
        self._client.register(registration)
        return self._client.info()

    def _tolerate(self, error: AtroposClientError) -> None:
        """Log and count a failure; raise it if polling on cannot mend it."""
        now = running_time()
        self._failing_since = self._failing_since or now
        self._marks.trouble = str(error)
        if isinstance(error, BatchPossiblyLost | UnreadableBatch):
            name = "possibly_lost" if isinstance(error, BatchPossiblyLost) else "unreadable"
            self._in_doubt = True  # an API that was reset answers 500 until somebody registers
            logger.error("%s (%d so far)", error, self._marks.add(name))
        else:
            self._marks.add("failed_requests")
            # What never worked is a wrong address or token; what once worked may be a restart behind a proxy.
            if not self._has_worked and not is_transient(error):
                raise error
            logger.warning("Polling on after: %s", error)
        if now - self._failing_since > self._settings.patience:
            raise error

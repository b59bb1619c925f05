"""The fetching process itself: polls, records, and never outlives the trainer by more than its farewell."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from atropos_client._poller import BatchPoller
from atropos_client.errors import AtroposClientError, BatchNotRecorded, PollerStopped
from atropos_client.fetcher._lines import LineReader, LineWriter, LogSender, error_to_message
from atropos_client.fetcher._settings import Order
from atropos_client.journal import Journal
from schemas import BatchReply, Registration

logger = logging.getLogger(__name__)

FAILED: Final = 3
"""Exit code after a failure that was reported on standard output."""

ORPHAN_LOG: Final = "fetcher.log"
"""Beside the journal: what there was to say when the trainer was gone."""

_TICK_SECONDS: Final = 0.2  # how soon the end of the trainer is noticed if its pipe is held open elsewhere
_SMALL_REPLY: Final = 4096
_DEADLY_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    """Run until standard input ends or says so; returns the exit code."""
    # A service manager signals every process of a service. The trainer then stops, and we with it; ending
    # before it would cut off a poll.
    for number in _DEADLY_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    out, log = LineWriter(sys.stdout.fileno()), LineWriter(sys.stderr.fileno())
    reader = LineReader(sys.stdin.fileno())
    lines: list[bytes] = []
    while not lines:
        came = reader.read(_TICK_SECONDS)
        if came is None:
            return 0
        lines = came
    order = Order.model_validate_json(lines.pop(0))
    logging.basicConfig(
        level=order.log_level, handlers=[LogSender(log, order.directory / ORPHAN_LOG)], force=True
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        journal = Journal.open(order.directory, limits=order.limits, inherited_lock=order.lock_descriptor)
    except AtroposClientError as error:
        out.send({"event": "failed", "error": error_to_message(error), "counters": {}})
        return FAILED
    with order.settings.make_client() as client:
        fetcher = Fetcher(order, journal, out, reader, lines)
        fetcher.poller = BatchPoller(
            client,
            fetcher.registration,
            # One is fetched for each `take`: how far ahead is the trainer's decision.
            depth=0,
            on_body=fetcher.record,
            before_poll=journal.require_room,
            first_pause=order.settings.first_pause,
            longest_pause=order.settings.longest_pause,
            longest_failure_pause=order.settings.longest_failure_pause,
            heartbeat=order.settings.heartbeat,
            patience=order.settings.patience,
        )
        return fetcher.run()


class Fetcher:
    """Obeys the trainer's messages; three threads: this one listens, one takes, and the poller's."""

    poller: BatchPoller

    def __init__(
        self, order: Order, journal: Journal, out: LineWriter, reader: LineReader, lines: list[bytes]
    ) -> None:
        """Prepare; `poller` is set afterwards, for it calls us back. `lines`: came with the order."""
        self._order = order
        self._journal = journal
        self._out = out
        self._reader = reader
        self._lines = lines
        self._version = order.served_version
        self._registration = order.settings.registration
        self._credits = threading.Semaphore(0)
        self._ending = threading.Event()
        self._failure: BaseException | None = None
        self._told_counters: dict[str, int] = {}

    # What the poller asks, in its thread.

    def registration(self) -> Registration:
        """How to register now."""
        return self._registration

    def record(self, body: bytes) -> None:
        """Write a reply to the journal, unless it certainly holds no batch."""
        if len(body) < _SMALL_REPLY and _holds_no_batch(body):
            return
        try:
            number = self._journal.append(body, self._version)
        except BatchNotRecorded as error:
            self._fail(error)  # at once: the body must reach somebody
            raise
        if not self._tell("recorded", number=number):
            logger.info("Recorded batch %d after the trainer was gone.", number)

    # The main thread.

    def run(self) -> int:
        """Listen until the trainer stops us, or is gone, or the poller fails."""
        self._tell("started", pid=os.getpid())
        taker = threading.Thread(target=self._take, name="atropos-taker", daemon=True)
        self.poller.start()
        taker.start()
        gone = self._listen()
        if gone:
            for number in _DEADLY_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
        self._finish_polling()
        self._ending.set()
        self._credits.release()
        # The taker ends with the poller; should a failure come last, it is reported before we go.
        taker.join(_TICK_SECONDS)
        if self._failure is None:
            self._tell("stopped")
            return 0
        return FAILED

    def _listen(self) -> bool:
        """Obey messages. True: the trainer is gone; False: it wants us to stop, or the poller failed."""
        while not self._ending.is_set():
            for line in self._lines:
                if not self._obey(json.loads(line)):
                    return False
            lines = self._reader.read(_TICK_SECONDS)
            # The second sign counts where a process that the trainer forked keeps its pipe open.
            if lines is None or os.getppid() != self._order.parent_pid:
                return True
            self._lines = lines
            if self._counters() != self._told_counters:
                self._tell("counters")
        return False

    def _obey(self, message: dict[str, object]) -> bool:
        """Do what one message says. False: stop."""
        match message:
            case {"do": "take"}:
                self._credits.release()
            case {"do": "version", "value": int(version)}:
                self._version = version
            case {"do": "step", "value": int(step)}:
                self._registration = self._registration.model_copy(update={"starting_step": step})
            case {"do": "explain"}:
                # May ask the API, which may take its time.
                threading.Thread(target=self._explain, daemon=True).start()
            case {"do": "stop"}:
                return False
            case _:
                logger.warning("The fetching process does not understand %s.", message)
        return True

    def _finish_polling(self) -> None:
        """Let the poll under way end, within the farewell; then close the journal."""
        farewell = self._order.settings.farewell
        started = time.monotonic()
        self.poller.stop(farewell)
        if time.monotonic() - started < farewell:
            self._journal.close()
        # Else the poll goes on until this process ends, and may still be recorded.

    # The taker's thread.

    def _take(self) -> None:
        try:
            while True:
                self._credits.acquire()
                if self._ending.is_set():
                    return
                self.poller.get()
                self._tell("taken")
        except PollerStopped:
            return
        except BaseException as error:  # noqa: BLE001 - whatever ended the poller is for the trainer to raise
            logger.error("Fetching ends: %s", error)  # noqa: TRY400 - the trainer raises it
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self._failure is not None:
            return
        self._failure = error
        told = self._tell("failed", error=error_to_message(error))
        if not told and isinstance(error, BatchNotRecorded):
            _last_resort(self._journal.directory, error.body)
        self._ending.set()

    def _explain(self) -> None:
        self._tell("explained", text=self.poller.explain_wait())

    def _counters(self) -> dict[str, int]:
        return dataclasses.asdict(self.poller.counters)

    def _tell(self, event: str, **more: object) -> bool:
        counters = self._counters()
        self._told_counters = counters
        return self._out.send({"event": event, "counters": counters, **more})


def _holds_no_batch(body: bytes) -> bool:
    try:
        return BatchReply.model_validate_json(body).state != "ready"
    except ValidationError:
        return False  # what cannot be read is kept


def _last_resort(directory: Path, body: bytes) -> None:
    """The journal refused a body and nobody is there to take it: try a plain file."""
    path = directory / f"unrecorded-{time.time_ns()}.json"
    try:
        path.touch(mode=0o600, exist_ok=False)
        with path.open("wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        logger.critical("A batch of %d bytes is lost: it could be written nowhere: %s", len(body), error)

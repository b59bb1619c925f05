"""Polls and records in the fetching process, and never outlives the trainer by more than its farewell."""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
import time
from typing import Final

from atropos_client._client import AtroposClient
from atropos_client.fetcher._last_words import write_last_words
from atropos_client.fetcher._loop import FetchLoop
from atropos_client.fetcher._settings import Order
from atropos_client.journal import Journal
from atropos_client.log_lines import line_formatter

logger = logging.getLogger(__name__)

FAILED: Final = 3
"""Exit code after a failure that was told on standard output."""

_TICK_SECONDS: Final = 0.2  # how soon the end of the trainer is noticed if its pipe is held open elsewhere
_DEADLY_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_READERS_PATIENCE: Final = 5.0  # beyond the farewell, for whoever reads our log lines


def main() -> int:
    """Run until standard input ends; returns the exit code."""
    # A service manager signals every process of a service. The trainer then stops, and we with it; ending
    # before it would cut off a poll.
    for number in _DEADLY_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        return 0  # the trainer is gone already
    order = Order.model_validate_json(line)
    _configure_logging(order.log_level)
    try:
        with (
            Journal.open(
                order.directory, limits=order.limits, inherited_lock=order.lock_descriptor
            ) as journal,
            AtroposClient(order.settings) as client,
        ):
            _fetch(order, FetchLoop(journal, client, order.settings, recorded=_tell_recorded), journal)
    except Exception as error:  # noqa: BLE001 - raised in the trainer
        _tell(write_last_words(error))
        return FAILED
    return 0


def _fetch(order: Order, loop: FetchLoop, journal: Journal) -> None:
    """Run the loop in a thread until it fails, or the trainer stops us or is gone."""
    failures: list[Exception] = []

    def run() -> None:
        try:
            loop.run()
        except Exception as error:  # noqa: BLE001 - raised below
            failures.append(error)

    thread = threading.Thread(target=run, name="atropos-poller", daemon=True)
    thread.start()
    _obey(order, loop, thread, journal)
    loop.stop()
    _let_finish(order, thread)
    if thread.is_alive():
        journal.marks.add("possibly_lost")
        logger.warning("Stopped while GET /batch had no reply yet: a batch is possibly lost.")
        os._exit(0)  # the journal stays open: should the reply come now, nobody waits for it
    if failures:
        raise failures[0]


def _obey(order: Order, loop: FetchLoop, thread: threading.Thread, journal: Journal) -> None:
    """Wake the loop whenever the trainer wants something else, until it wants nothing more."""
    pipe = sys.stdin.fileno()
    poll = select.poll()  # select() knows no descriptor above 1,023
    poll.register(pipe, select.POLLIN)
    while thread.is_alive():
        journal.marks.set("alive_at", time.monotonic_ns())
        if poll.poll(_TICK_SECONDS * 1000):
            if not os.read(pipe, 4096):
                return
            loop.wake()
        if os.getppid() != order.parent_pid:  # a process that it forked may hold its pipe open
            return


def _let_finish(order: Order, thread: threading.Thread) -> None:
    """Let the poll under way end, within the farewell."""
    end = time.monotonic() + order.settings.farewell
    # Whoever reads our log lines may have stopped to; the lock must not be held for it.
    guard = threading.Timer(order.settings.farewell + _READERS_PATIENCE, os._exit, (1,))
    guard.daemon = True
    guard.start()
    while thread.is_alive() and time.monotonic() < end:
        thread.join(min(_TICK_SECONDS, max(0.0, end - time.monotonic())))
        if os.getppid() != order.parent_pid:  # nobody's stop would be cut short any more
            for number in _DEADLY_SIGNALS:
                signal.signal(number, signal.SIG_DFL)


def _tell_recorded() -> None:
    _tell(b"\n")


def _tell(line: bytes) -> None:
    try:
        os.write(sys.stdout.fileno(), line)
    except BrokenPipeError:
        logger.debug("the trainer is gone")


def _configure_logging(level: int) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(line_formatter())
    # Of what we use, only warnings: httpcore says at lower levels what servers send back, tokens included.
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("atropos_client").setLevel(level)

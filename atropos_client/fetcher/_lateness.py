"""Says who is late while no batch comes: to whoever asks, and in the log at every heartbeat."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Final

from atropos_client._client import AtroposClient
from atropos_client.clock import running_time
from atropos_client.errors import AtroposClientError
from atropos_client.fetcher._process import FetchingProcess
from atropos_client.fetcher._settings import FetcherSettings
from atropos_client.journal import Marks
from atropos_client.waiting import WaitFacts, ask_status, explain_wait, why_no_batch_is_full

logger = logging.getLogger(__name__)

_SOON: Final = 5.0  # seconds of waiting after which is said what no waiting can mend
_LONG_LOADING: Final = 1.0  # seconds after which a wait is one for the loading, not for the API
_LONG_SILENCE: Final = 3.0  # seconds without a sign of life after which a wait is one for the process


class Lateness:
    """Explains a wait, with a thread that does so in the log.

    Args:
        settings: How to reach the API, and how often to speak.
        marks: Of the journal.
        process: That fetches.
    """

    def __init__(self, settings: FetcherSettings, marks: Marks, process: FetchingProcess) -> None:
        self.wanting_since: float | None = None
        """Set by the fetcher, as are the next ones: on the running clock; None: nobody is late."""
        self.loading: tuple[int, float] | None = None
        """Which batch is being read and prepared, and since when on the monotonic clock."""
        self.group_size: float | None = None
        """Sequences per group in the last batch."""
        self.failure: BaseException | None = None
        """The error that ended the fetching."""
        self._settings = settings
        self._marks = marks
        self._process = process
        self._stopped = threading.Event()
        self._next_line_at = 0.0  # of the heartbeat's thread alone, as is the next one
        self._said_at_once = False

    def start_heartbeat(self) -> None:
        """Log a line from now on whenever it is time for one."""
        threading.Thread(target=self._beat, name="atropos-heartbeat", daemon=True).start()

    def stop_heartbeat(self) -> None:
        """Log nothing more. Nobody waits for the thread: it may be asking a server that hangs."""
        self._stopped.set()

    def explain(self) -> str:
        """Say in one line who is late. Asks the API for its status if that is likely to answer."""
        return self._explain_here() or explain_wait(self._asked_facts())

    def _explain_here(self) -> str | None:
        """Say what this machine knows by itself, if that is why there is no batch."""
        loading = self.loading
        if loading is not None and (seconds := time.monotonic() - loading[1]) > _LONG_LOADING:
            return f"batch {loading[0]} is recorded, and being read and prepared for {seconds:.0f} s"
        if self.failure is not None:
            return f"fetching has ended: {self.failure}"
        if self._process.pid is None:
            return "the fetching process is being started"
        silent = self._process.silent_seconds()
        if silent > _LONG_SILENCE:
            return f"no batch: process {self._process.pid}, which fetches, has not moved for {silent:.0f} s"
        return None

    def _asked_facts(self) -> WaitFacts:
        """Return what is known, and what the API says, if it is likely to answer."""
        marks, since = self._marks, self.wanting_since
        polling_since = marks.get("polling_since")
        facts = WaitFacts(
            url=self._settings.url,
            waited=0.0 if since is None else running_time() - since,
            batch_size=self._settings.registration.batch_size,
            max_token_len=self._settings.registration.max_token_len,
            batches=marks.get("batches"),
            group_size=self.group_size,
            in_flight=time.monotonic() - polling_since / 1e9 if polling_since else None,
            trouble=marks.trouble,
            status=None,
        )
        if facts.trouble is not None or (facts.in_flight is not None and facts.in_flight >= 1):
            return facts
        with AtroposClient(self._settings) as client:
            return ask_status(client, facts)

    def _beat(self) -> None:
        while not self._stopped.wait(min(self._settings.heartbeat, _SOON)):
            line = self._late_line()
            if line is not None and not self._stopped.is_set():
                logger.warning("%s", line)

    def _late_line(self) -> str | None:
        """A line at every heartbeat; before the first batch at once, if no waiting can mend it."""
        now, since = running_time(), self.wanting_since
        if since is None:
            return None
        if now - since >= self._settings.heartbeat and now >= self._next_line_at:
            self._next_line_at = now + self._settings.heartbeat
            line = self.explain()
            return None if self.wanting_since is None else line  # one came while we asked
        if self._said_at_once or self._marks.get("batches"):
            return None
        with AtroposClient(self._settings) as client, contextlib.suppress(AtroposClientError):
            latest, batch_size = client.latest_example(), client.info().batch_size
            never_full = why_no_batch_is_full(batch_size, latest.sequence_count) if latest else None
            self._said_at_once = never_full is not None
            return never_full and f"no batch will come: {never_full}"
        return None

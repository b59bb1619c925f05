"""A fetcher whose fetching process is a thread of the test: the same loop, without the time to start one."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

from atropos_client import AtroposClient
from atropos_client.fetcher import Fetcher
from atropos_client.fetcher._loop import FetchLoop
from atropos_client.fetcher._process import FetchingProcess


class FetchingThread(FetchingProcess):
    """Takes the place of the process."""

    _loop: FetchLoop | None = None

    @property
    def pid(self) -> int | None:
        return os.getpid()

    def silent_seconds(self) -> float:
        return 0.0

    def wake(self) -> None:
        if self._loop is not None:
            self._loop.wake()

    def stop(self) -> None:
        self._stopping.set()
        if self._loop is not None:
            self._loop.stop()

    def run(self) -> Iterator[None]:
        news = threading.Event()
        failures: list[BaseException] = []

        def fetch(loop: FetchLoop) -> None:
            try:
                loop.run()
            except BaseException as error:  # noqa: BLE001 - raised below
                failures.append(error)

        with AtroposClient(self._settings) as client:
            self._loop = FetchLoop(self._journal, client, self._settings, recorded=news.set)
            if self._stopping.is_set():
                return
            thread = threading.Thread(target=fetch, args=(self._loop,), name="atropos-poller", daemon=True)
            thread.start()
            while thread.is_alive():
                news.wait(0.01)
                news.clear()
                yield
        yield
        if failures:
            raise failures[0]


class ThreadFetcher(Fetcher):
    """Fetches in a thread."""

    def _make_process(self) -> FetchingProcess:
        return FetchingThread(self._journal, self._settings)

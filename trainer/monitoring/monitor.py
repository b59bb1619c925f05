"""Puts together everything that watches a run, from its configuration."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from http import HTTPStatus
from pathlib import Path
from typing import Final, Self

from atropos_client.private_files import make_run_directory, replace_private
from trainer.config import TrainerConfig
from trainer.launch import launched_rank
from trainer.monitoring.health import HealthReport, health_report, is_healthy, metrics_page
from trainer.monitoring.phases import Progress, phase_deadlines
from trainer.monitoring.server import HealthServer, PageReply
from trainer.monitoring.watchdog import Watchdog

logger = logging.getLogger(__name__)

HEALTH_FILE: Final = "health.json"
"""In the run's output directory."""

_JOIN_SECONDS: Final = 5.0


class RunMonitor:
    """The watchdog, the health server and the health file of one run; a context manager.

    With several processes each has a watchdog; only process 0 reports.

    Args:
        config: The run's configuration.

    Raises:
        ConfigurationError: The server cannot listen, or prometheus_client is missing.
    """

    def __init__(self, config: TrainerConfig) -> None:
        self._config = config
        self._is_main_process = launched_rank() == 0
        self._deadlines = phase_deadlines(config, is_main_process=self._is_main_process)
        self._server: HealthServer | None = None
        self.progress = Progress()
        """For the trainer to write to."""

    def report(self) -> HealthReport:
        """Report the run's health."""
        return health_report(self.progress, self._deadlines)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self._is_main_process:
                self._report_by(stack)
            if self._config.watchdog.enabled:
                stack.enter_context(Watchdog(self.progress, self._deadlines, self._config))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _report_by(self, stack: ExitStack) -> None:
        health = self._config.health
        if health.port is not None:
            pages = {"/health": self._health_page}
            if health.prometheus:
                pages["/metrics"] = metrics_page(self.report)
            self._server = stack.enter_context(HealthServer(health.host, health.port, pages))
            logger.info("Health of the run: %s/health", self._server.url)
        if health.file_every is not None:
            path = self._config.train.output_dir / HEALTH_FILE
            stack.enter_context(_HealthFile(path, self._file_report, every=health.file_every))

    def _health_page(self) -> PageReply:
        report = self.report()
        status = HTTPStatus.OK if is_healthy(report) else HTTPStatus.SERVICE_UNAVAILABLE
        return PageReply(status, "application/json", json.dumps(report).encode() + b"\n")

    def _file_report(self) -> HealthReport:
        return {**self.report(), "url": self._server.url if self._server is not None else None}


class _HealthFile:
    """Writes the report to a file at a fixed rate, as a whole each time, in a thread of its own."""

    def __init__(self, path: Path, report: Callable[[], HealthReport], *, every: float) -> None:
        self._path = path
        self._report = report
        self._every = every
        self._failed = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="health-file", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        self._write(self._report())
        while not self._stop.wait(self._every):
            self._write(self._report())
        self._write({**self._report(), "status": "ended"})

    def _write(self, report: HealthReport) -> None:
        try:
            make_run_directory(self._path.parent)
            replace_private(self._path, json.dumps(report).encode() + b"\n")
        except OSError as error:
            if not self._failed:  # a full disk is said by others; once is enough here
                logger.warning("Cannot write %s: %s", self._path, error)
            self._failed = True
        else:
            self._failed = False

"""Puts together everything that watches a run, from its configuration."""

from __future__ import annotations

import json
import logging
import threading
from contextlib import ExitStack
from http import HTTPStatus
from typing import Final, Self

from atropos_client.private_files import make_run_directory, replace_private
from trainer.config import TrainerConfig
from trainer.launch import launched_rank
from trainer.monitoring.health import HealthReport, health_report, is_healthy, metrics_page
from trainer.monitoring.phases import Progress, phase_deadlines
from trainer.monitoring.server import HealthServer, PageReply, Site
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
        site: Answers what else is asked on the health port: the page of the run. None: nothing is there.

    Raises:
        ConfigurationError: The server cannot listen, or prometheus_client is missing.
    """

    def __init__(self, config: TrainerConfig, *, site: Site | None = None) -> None:
        self._config = config
        self._site = site
        self._is_main_process = launched_rank() == 0
        self._deadlines = phase_deadlines(config, is_main_process=self._is_main_process)
        self._server: HealthServer | None = None
        self._ended = threading.Event()
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
            self._server = stack.enter_context(HealthServer(health.host, health.port, pages, site=self._site))
            logger.info("Health of the run: %s/health", self._server.url)
            if self._site is not None:
                logger.info("Page of the run: %s/", self._server.url)
        if health.file_every is not None:
            writer = threading.Thread(
                target=self._write_file, args=(health.file_every,), name="health-file", daemon=True
            )
            writer.start()
            stack.callback(writer.join, _JOIN_SECONDS)
            stack.callback(self._ended.set)  # before that

    def _health_page(self) -> PageReply:
        report = self.report()
        status = HTTPStatus.OK if is_healthy(report) else HTTPStatus.SERVICE_UNAVAILABLE
        return PageReply(status, "application/json", json.dumps(report).encode() + b"\n")

    def _write_file(self, every: float) -> None:
        """Write the report to a file, as a whole each time, until the run has ended."""
        path = self._config.train.output_dir / HEALTH_FILE
        ended = failed = False
        while True:
            report = {**self.report(), "url": self._server.url if self._server is not None else None}
            if ended:
                report["status"] = "ended"
            try:
                make_run_directory(path.parent)
                replace_private(path, json.dumps(report).encode() + b"\n")
                failed = False
            except OSError as error:
                if not failed:  # a full disk is said by others; once is enough here
                    logger.warning("Cannot write %s: %s", path, error)
                failed = True
            if ended:
                return
            ended = self._ended.wait(every)

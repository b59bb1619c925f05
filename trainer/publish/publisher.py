"""Publishes new weights to every inference server, with the proof that they are served.

Data flow: live model -> captured (training thread) -> staged -> per server: pause, load, reset, tag, resume,
verify -> report. With a transport that detaches the weights from the model, everything after `capture`
happens in a background thread while the next step trains. Between publishes a second thread looks after the
servers: one that was restarted gets the current version again.

The pieces: `transports` (how weights travel), `engines` (what a server speaks), `member` (the order at one
server), `fleet` (all servers, and failures), `verification` (the proof).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from trainer.config import PublishSettings
from trainer.errors import ConfigurationError
from trainer.publish.errors import PublishError
from trainer.publish.fleet import Fleet
from trainer.publish.interfaces import InferenceServer, WeightTransport
from trainer.publish.member import Job
from trainer.publish.report import PublishReport
from trainer.publish.verification.compare_logprobs import TOLERANCES, ProbeScores
from trainer.publish.verification.probes import Probes
from trainer.publish.verification.verifier import (
    Expectation,
    LogprobPolicy,
    ServerVerifier,
    tolerance_for,
)

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
"""Seconds between two checks, while waiting for a publish, whether the run is to end."""

REMIND_SECONDS = 15.0
"""Seconds between two log lines that say what is waited for."""


@dataclass(frozen=True, kw_only=True)
class _Capture:
    """Holds a version that no longer needs the live model, unless its transport sends from it."""

    started: float
    """When its publish began, on the monotonic clock."""
    seconds: float
    """Seconds that training stood still for it."""
    stage: Callable[[], Job]
    """Finishes staging."""


class Publisher:
    """Publishes versions of one model to all servers of the configuration.

    Use it from one thread, the training thread; `served_version` and `loaded_version` may be read from
    others. It is a context manager, which ends its threads and closes its connections.

    Args:
        settings: Section `publish` of the configuration.
        transport: How weights get into the servers.
        servers: The inference servers.
        probes: What verification asks (`make_probes`).
        score: Gives the trainer's own log-probs of them (`score_probes`).
        logprobs: What the servers' log-probs have to be at temperatures other than 1.
        stop_requested: Whether the run is to end soon: a failing publish is then not repeated any more.

    Raises:
        ConfigurationError: There is no server: nothing can be published.
    """

    def __init__(
        self,
        settings: PublishSettings,
        *,
        transport: WeightTransport,
        servers: Sequence[InferenceServer],
        probes: Probes,
        score: Callable[[Probes], ProbeScores],
        logprobs: LogprobPolicy | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        if not servers:
            raise ConfigurationError("there is no inference server to publish to; set publish.servers")
        self._settings = settings
        self._probes = probes
        self._score = score
        self._transport = transport
        self._stop_requested = stop_requested
        self._overlaps = settings.overlap and transport.overlaps
        self._cancelled = threading.Event()
        self._fleet = Fleet(
            [(server, ServerVerifier(server, probes, logprobs=logprobs)) for server in servers],
            transport,
            settings,
            cancelled=self._cancelled,
        )
        self._needs_repair = threading.Event()
        self._busy = threading.Lock()  # the servers are spoken to by one thread at a time
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="publisher")
        self._watcher = threading.Thread(target=self._watch, name="publish-watch", daemon=True)
        self._under_way: Future[object] | None = None
        self._under_way_version = -1
        self._reports: list[PublishReport] = []
        self._current: Job | None = None
        self._served_version: int | None = None

    @property
    def served_version(self) -> int | None:
        """The last version that every server counted on is proven to serve; None before `start`.

        With `publish.verify` off: the last version that they have accepted. Thread-safe.
        """
        return self._served_version

    @property
    def loaded_version(self) -> int | None:
        """The oldest version that environments may be sampling from, proven or not yet. Thread-safe.

        None while a server's weights are not known, for instance during a publish.
        """
        return self._fleet.loaded_version()

    @property
    def sampled_version(self) -> int:
        """Version that environments sample from, as far as it is known; -1: not known."""
        version = self.loaded_version
        if version is None:  # a publish is under way: what was proven last is what most of it came from
            version = self.served_version
        return -1 if version is None else version

    def start(self, version: int) -> PublishReport:
        """Make sure that every server serves the current weights, before anything is sampled.

        Waits until the servers are ready and resumes one that a trainer before us left paused. If every
        server proves to serve these weights already, it only gets its label; otherwise they are published.
        Here the first failure ends it, whatever `publish.on_failure` says: what does not work at the start
        is a matter of configuration.

        Raises:
            PublishError: A server did not become ready, or the weights are not proven to be served.
        """
        started = time.monotonic()
        with self._busy:
            self._fleet.make_ready(version)
        report = self._already_served(version, started)
        if report is None:
            report = self._publish_here(version, patient=False)
        else:
            self._remember(version)
        self._watcher.start()
        return report

    def begin(self, version: int) -> None:
        """Publish the current weights as `version`; return as soon as training may change them.

        Waits for the publish before, so that there is never more than one under way.

        Raises:
            PublishError: The publish before has failed; or, where nothing overlaps, this one.
        """
        self.settle()
        if not self._overlaps:
            self._publish_here(version, patient=True)
            return
        capture = self._capture(version)
        self._under_way_version = version
        self._under_way = self._worker.submit(self._complete, capture, patient=True)

    def settle(self) -> None:
        """Wait until no publish is under way.

        Raises:
            PublishError: It has failed.
        """
        if self._under_way is None:
            return
        started = reminded = time.monotonic()
        while not wait_for_futures([self._under_way], POLL_SECONDS).done:
            if self._stop_requested():
                self._cancelled.set()
            if time.monotonic() - reminded > REMIND_SECONDS:
                reminded = time.monotonic()
                logger.info(
                    "waiting for the publish of version %d to %s (%.0f s)",
                    self._under_way_version,
                    ", ".join(member.server.url for member in self._fleet.members),
                    reminded - started,
                )
        ended, self._under_way = self._under_way, None
        ended.result()

    def publish(self, version: int) -> PublishReport:
        """Publish the current weights as `version` and wait for the proof.

        Publishing the same version again, for instance after a server was restarted, reuses what was
        written the first time.

        Raises:
            StagingFailed: The weights could not be written; no server was touched.
            ServerFailure: There is one server, and one phase failed.
            PublishFailed: Any other failure; `.outcomes` has what happened at every server.
        """
        self.settle()
        return self._publish_here(version, patient=True)

    def tend(self, version: int) -> None:
        """Let the training thread see to what only it can do; call it often, also while waiting.

        A failure in the background comes out here. With a transport that sends weights from the live model,
        a server that was restarted gets them again, as `version`.

        Raises:
            PublishError: The publish under way has failed.
        """
        if self._under_way is not None and self._under_way.done():
            self.settle()
        if self._transport.overlaps or self._under_way is not None:
            return
        if self._needs_repair.is_set():
            self._needs_repair.clear()
            self._publish_here(version, patient=True)

    def take_reports(self) -> list[PublishReport]:
        """Return the reports of the publishes that have ended since the last call, oldest first."""
        reports, self._reports = self._reports, []
        return reports

    def close(self) -> None:
        """End the threads, waiting for a publish under way (no longer for its retries); close connections."""
        self._cancelled.set()
        self._worker.shutdown(wait=True)
        if self._watcher.is_alive():
            self._watcher.join()
        self._fleet.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _already_served(self, version: int, started: float) -> PublishReport | None:
        """Report a start at which nothing had to be sent; None if something has to be."""
        if not self._settings.verify:
            return None
        # "Close" is not enough to skip a publish: the server may hold a neighbouring version. A server
        # that rounds more than float32 does therefore gets the weights once more, which settles it.
        strictest = min(tolerance_for("float32", self._settings.tolerance), TOLERANCES["float32"])
        expectation = Expectation(version=version, scores=self._score(self._probes), tolerance=strictest)
        with self._busy:
            report = self._fleet.check_served(expectation)
        if report is None:
            logger.info("version %d is not proven to be served yet: publishing it", version)
            return None
        self._served_version = version
        return self._keep(replace(report, total_seconds=time.monotonic() - started))

    def _remember(self, version: int) -> None:
        """Stage a version that is served already: a server that restarts before the next will need it."""
        if not self._overlaps:
            return
        capture = self._capture(version)

        def remember() -> None:
            job = capture.stage()
            with self._busy:
                self._current = job

        self._under_way_version = version
        self._under_way = self._worker.submit(remember)

    def _publish_here(self, version: int, *, patient: bool) -> PublishReport:
        return self._complete(self._capture(version), patient=patient)

    def _capture(self, version: int) -> _Capture:
        """Take all that has to see the model before the next step changes it."""
        started = time.monotonic()
        stage = self._transport.capture(version)
        scores = self._score(self._probes) if self._settings.verify else None

        def job() -> Job:
            staged = stage()
            expectation = None
            if scores is not None:
                tolerance = tolerance_for(staged.dtype, self._settings.tolerance)
                expectation = Expectation(version=version, scores=scores, tolerance=tolerance)
            return Job(staged=staged, expectation=expectation)

        return _Capture(started=started, seconds=time.monotonic() - started, stage=job)

    def _complete(self, capture: _Capture, *, patient: bool) -> PublishReport:
        """Stage, publish and report, in whatever thread."""
        staging = time.monotonic()
        job = capture.stage()
        stage_seconds = time.monotonic() - staging
        with self._busy:
            report = self._fleet.bring(job, patient=patient)
            self._current = job
        self._served_version = job.version
        self._transport.prune(job.version)
        report = replace(
            report,
            capture_seconds=capture.seconds,
            stage_seconds=stage_seconds,
            total_seconds=time.monotonic() - capture.started,
        )
        return self._keep(report)

    def _keep(self, report: PublishReport) -> PublishReport:
        logger.info("%s", report.describe())
        self._reports.append(report)
        return report

    def _watch(self) -> None:
        """Look after the servers between publishes, until `close`."""
        while not self._cancelled.wait(self._settings.watch_interval):
            if not self._busy.acquire(blocking=False):  # a publish is under way: it looks for itself
                continue
            try:
                self._look_after_servers()
            except PublishError as error:
                logger.warning("looking after the servers: %s", error)
            finally:
                self._busy.release()

    def _look_after_servers(self) -> None:
        job = self._current
        if job is None:
            return
        for member in self._fleet.members:
            if not member.is_out_of_date(job):
                continue
            if self._transport.overlaps:
                member.repair(job)
            else:
                self._needs_repair.set()

"""New weights to every inference server, and the proof that they are served.

Data flow: trainer's model -> probe scores and a staged directory -> per server: pause, load, reset, tag,
resume, verify -> report. The pieces are in `_disk` (staging), `_vllm` (the server's dialect), `_procedure`
(the order) and `comparison` (the judgement).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from trainer.config import PublishSettings
from trainer.errors import ConfigurationError
from trainer.publish._disk import DiskTransport
from trainer.publish._procedure import ServerOutcome, publish_to_server
from trainer.publish._protocol import InferenceServer, WeightTransport
from trainer.publish._report import PublishReport
from trainer.publish._verification import Expectation, ServerVerifier, tolerance_for
from trainer.publish._vllm import VllmRoutes
from trainer.publish.comparison import TOLERANCES, Scores
from trainer.publish.errors import PublishFailed, ServerFailure

logger = logging.getLogger(__name__)


class Publisher:
    """Publishes versions of one model to all servers of the configuration.

    Use it from one thread; only `served_version` may be read from others. It is a context manager, which
    closes its connections.

    Args:
        settings: Section `publish` of the configuration.
        probes: Token ids of the texts that verification scores (`make_probes`).
        score: Gives the trainer's own log-probs of tokens 1..T-1 of each probe (`score_with_model`).
        write: Writes the current weights as the directory that it is given, whole or not at all
            (`trainer.model_directory.write_model_directory`).
        directory: Where versioned weights go; the servers see it under the same path.
        served_model_name: The model's name on the servers. None: the only one that they serve.

    Raises:
        ConfigurationError: `publish.transport` is `none`: there is nothing to publish to.
    """

    def __init__(
        self,
        settings: PublishSettings,
        *,
        probes: list[list[int]],
        score: Callable[[list[list[int]]], Scores],
        write: Callable[[Path], None],
        directory: Path,
        served_model_name: str | None = None,
    ) -> None:
        if settings.transport == "none":
            raise ConfigurationError(
                "publish.transport is 'none': nothing can be published; set it to 'disk'"
            )
        self._settings = settings
        self._probes = probes
        self._score = score
        self._transport: WeightTransport = DiskTransport(directory, write, keep=settings.keep)
        self._servers: list[InferenceServer] = [
            VllmRoutes(url, settings, served_model_name=served_model_name) for url in settings.servers
        ]
        self._verifiers = [ServerVerifier(server, probes) for server in self._servers]
        self._lock = threading.Lock()
        self._served_version: int | None = None

    @property
    def served_version(self) -> int | None:
        """The last version that every server is proven to serve; None before `start`. Thread-safe.

        With `publish.verify` off: the last version that every server has accepted.
        """
        with self._lock:
            return self._served_version

    def start(self, version: int) -> PublishReport:
        """Make sure that every server serves the current weights, before anything is sampled.

        Waits until the servers are ready and resumes one that a trainer before us left paused. If every
        server proves to serve these weights already, it only gets its label; otherwise they are published.

        Raises:
            PublishError: A server did not become ready, or the weights are not proven to be served.
        """
        started = time.monotonic()
        self._raise_any(version, self._on_every_server(self._make_ready))
        if self._settings.verify:
            # "Close" is not enough to skip a publish: the server may hold a neighbouring version. A server
            # that rounds more than float32 does therefore gets the weights once more, which settles it.
            strictest = tolerance_for("float32", self._settings.tolerance)
            expectation = self._expect(version, min(strictest, TOLERANCES["float32"]))
            outcomes = self._on_every_server(lambda index: self._check_served(index, expectation))
            self._raise_any(version, outcomes)
            if all(outcome.comparison is not None and outcome.comparison.matches for outcome in outcomes):
                return self._succeeded(version, outcomes, started=started, already_served=True)
            logger.info("version %d is not proven to be served yet: publishing it", version)
        return self.publish(version)

    def publish(self, version: int) -> PublishReport:
        """Bring the current weights to every server, as `version`, and verify each.

        Publishing the same version again, for instance after a server was restarted, reuses what was
        written the first time.

        Raises:
            StagingFailed: The weights could not be written; no server was touched.
            ServerFailure: There is one server, and one phase failed.
            PublishFailed: Any other failure; `.outcomes` has what happened at every server.
        """
        started = time.monotonic()
        staged = self._transport.stage(version)
        tolerance = tolerance_for(staged.dtype, self._settings.tolerance)
        expectation = self._expect(version, tolerance) if self._settings.verify else None
        stage_seconds = time.monotonic() - started
        outcomes = self._on_every_server(
            lambda index: publish_to_server(
                self._servers[index],
                self._transport,
                staged,
                verifier=self._verifiers[index],
                expectation=expectation,
            )
        )
        self._raise_any(version, outcomes)
        return self._succeeded(version, outcomes, started=started, stage_seconds=stage_seconds)

    def close(self) -> None:
        """Close the connections to the servers; nothing can be published afterwards."""
        for server in self._servers:
            server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _expect(self, version: int, tolerance: float) -> Expectation:
        return Expectation(version=version, scores=self._score(self._probes), tolerance=tolerance)

    def _make_ready(self, index: int) -> ServerOutcome:
        server = self._servers[index]
        errors: tuple[ServerFailure, ...] = ()
        try:
            server.wait_until_ready()
            if server.is_paused():
                logger.warning("%s is paused, perhaps by a trainer that died: resuming it", server.url)
                server.resume(None)
        except ServerFailure as error:
            errors = (error,)
        return ServerOutcome(server=server.url, errors=errors)

    def _check_served(self, index: int, expectation: Expectation) -> ServerOutcome:
        server = self._servers[index]
        comparison = None
        errors: tuple[ServerFailure, ...] = ()
        try:
            comparison = self._verifiers[index].compare(expectation)
            if comparison.matches:
                server.tag(expectation.version)
        except ServerFailure as error:
            errors = (error,)
        return ServerOutcome(server=server.url, comparison=comparison, errors=errors)

    def _on_every_server(self, action: Callable[[int], ServerOutcome]) -> list[ServerOutcome]:
        """Run an action for all servers at once and wait for all of them."""
        if len(self._servers) == 1:  # in this thread, so that Ctrl-C ends the wait and still resumes
            return [action(0)]
        with ThreadPoolExecutor(len(self._servers), thread_name_prefix="publish") as pool:
            return list(pool.map(action, range(len(self._servers))))

    def _raise_any(self, version: int, outcomes: list[ServerOutcome]) -> None:
        """Raise what failed. The place for a policy that goes on with the servers that are left."""
        failed = [outcome for outcome in outcomes if outcome.errors]
        if len(outcomes) == 1 and failed and len(failed[0].errors) == 1:
            raise failed[0].errors[0]
        if failed:
            raise PublishFailed(version, outcomes) from failed[0].errors[0]

    def _succeeded(
        self,
        version: int,
        outcomes: list[ServerOutcome],
        *,
        started: float,
        stage_seconds: float = 0.0,
        already_served: bool = False,
    ) -> PublishReport:
        with self._lock:
            self._served_version = version
        self._transport.prune(version)
        return PublishReport(
            version=version,
            already_served=already_served,
            verified=self._settings.verify,
            stage_seconds=stage_seconds,
            pause_seconds=max(outcome.pause_seconds for outcome in outcomes),
            total_seconds=time.monotonic() - started,
            servers=tuple(outcomes),
        )

"""Publishes versions to one server, in one order whatever the engine and the transport.

    prepare -> pause -> load -> reset caches -> tag -> resume (always) -> verify -> activate

A transport that loads beside what is served (an adapter) needs no pause: it loads, proves, and only then
activates. A server is never left paused: `resume` runs after any failure, an interrupt included, and its own
failure is reported beside the first one. A server that failed to load is resumed all the same: what it
serves then is unknown, but the error says so, and the environments do not hang.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from trainer.publish.errors import ServerFailure
from trainer.publish.interfaces import InferenceServer, StagedWeights, WeightTransport
from trainer.publish.report import ServerOutcome
from trainer.publish.verification.compare_logprobs import Comparison
from trainer.publish.verification.verifier import Expectation, ServerVerifier, VerificationFailed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Holds one version, ready for any server, now or when it comes back."""

    staged: StagedWeights
    expectation: Expectation | None
    """Log-probs that a server which has it should give. None: not to be verified."""

    @property
    def version(self) -> int:
        """The policy version."""
        return self.staged.version


class Member:
    """Publishes to one server. Used from one thread at a time.

    Failures are returned, not raised, so that every server's outcome is known when the first is reported.

    Args:
        server: The server.
        transport: How weights get into it.
        verifier: This server's.
    """

    def __init__(self, server: InferenceServer, transport: WeightTransport, verifier: ServerVerifier) -> None:
        self.server = server
        self.version: int | None = None
        """The version that environments get from it; None where that is not known."""
        self.lost: ServerOutcome | None = None
        """Why the run goes on without it; None if it does not."""
        self._transport = self._way = transport
        self._verifier = verifier
        self._connected = False
        self._reachable = True

    def give_up(self, outcome: ServerOutcome) -> None:
        """Go on without it."""
        self.lost = outcome
        self._reachable = False

    def make_ready(self) -> ServerOutcome:
        """Wait until it is ready, resume it if it was left paused, and shake hands."""

        def ready() -> None:
            self.server.wait_until_ready()
            self._shake_hands()

        return self._outcome(ready)

    def check_served(self, expectation: Expectation) -> ServerOutcome:
        """Ask whether it serves a version already; label it if it does."""
        self.server.name_in_messages(expectation.version)

        def check() -> Comparison | None:
            # What comes under a name of its own is not there yet, whatever the model itself serves.
            if not self._way.pauses:
                return None
            comparison = self._verifier.compare(expectation)
            if comparison.matches:
                self.server.tag(expectation.version)
                self.version = expectation.version
            return comparison

        return self._outcome(check)

    def publish(self, job: Job) -> ServerOutcome:
        """Bring a version into the server and prove it; shake hands first where that is due."""
        server, expectation = self.server, job.expectation
        server.name_in_messages(job.version)
        if not self._connected:
            outcome = self._outcome(self._shake_hands)
            if outcome.errors:
                return outcome
        transport = self._way
        comparison: Comparison | None = None
        errors: list[ServerFailure] = []
        seconds: dict[str, float] = {}
        with _collected(errors):
            with _timed(seconds, "prepare_seconds"):
                transport.prepare(server, job.staged)
            self.version = None
            if transport.pauses:
                if expectation is not None:
                    self._verifier.warm()
                with _timed(seconds, "pause_seconds"):
                    self._update(job.staged, seconds, errors)
                self.version = None if errors else job.version
            else:
                with _timed(seconds, "load_seconds"):
                    transport.load(server, job.staged)
            if not errors and expectation is not None:
                with _timed(seconds, "verify_seconds"):
                    comparison = self._verifier.verify(expectation, served_name=transport.served_name(server))
            if not errors:
                transport.activate(server, job.staged)
                self.version = job.version
        for error in errors:
            if isinstance(error, VerificationFailed):
                comparison = error.comparison
        self._connected = not errors
        self._reachable = self._reachable or not errors
        return ServerOutcome(server=server.url, comparison=comparison, errors=tuple(errors), **seconds)

    def is_out_of_date(self, job: Job) -> bool:
        """Tell whether it is back, or no longer shows the current version: restarted, as a rule."""
        try:
            served = self._way.is_served(self.server, job.staged)
        except ServerFailure as error:
            if self._reachable and self.lost is None:
                logger.warning("%s does not answer; waiting for it: %s", self.server.url, error.reason)
            self._reachable = False
            return False
        return not served or not self._reachable or self.lost is not None

    def repair(self, job: Job) -> None:
        """Bring the current version to it again; a failure is logged, and left to the next look."""
        logger.warning(
            "%s does not serve version %d any more, or is back after a failure: publishing it again",
            self.server.url,
            job.version,
        )
        self._connected = False
        outcome = self.publish(job)
        if outcome.errors:
            self._reachable = False
            logger.warning("version %d is still not served: %s", job.version, outcome.errors[0])
            return
        self.lost = None
        logger.info("%s serves version %d again", self.server.url, job.version)

    def _shake_hands(self) -> None:
        # First of all: what a paused server is asked waits, and is answered too late.
        if self.server.is_paused():
            logger.warning(
                "%s is paused, by a publish that failed or by a trainer that died: resuming it",
                self.server.url,
            )
            self.server.resume()
        self._way = self._transport.connect(self.server)
        self._connected = True

    def _update(self, staged: StagedWeights, seconds: dict[str, float], errors: list[ServerFailure]) -> None:
        """Pause, load, reset caches, tag, resume."""
        try:
            with _collected(errors):
                # Even a pause that failed may have paused: a reply can be lost on its way.
                self.server.pause()
                with _timed(seconds, "load_seconds"):
                    self._way.load(self.server, staged)
                self.server.reset_caches()
                self.server.tag(staged.version)
        finally:
            with _collected(errors):
                self.server.resume()

    def _outcome(self, action: Callable[[], Comparison | None]) -> ServerOutcome:
        try:
            return ServerOutcome(server=self.server.url, comparison=action())
        except ServerFailure as error:
            return ServerOutcome(server=self.server.url, errors=(error,))


@contextmanager
def _collected(errors: list[ServerFailure]) -> Iterator[None]:
    """End the block at a failure, and keep it."""
    try:
        yield
    except ServerFailure as error:
        logger.error("%s", error)  # noqa: TRY400 - an interrupt may be under way, which would hide it
        errors.append(error)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long the block took, however it ends."""
    started = time.monotonic()
    try:
        yield
    finally:
        seconds[name] = time.monotonic() - started

"""The one order in which every server gets every version, whatever the engine and the transport.

    pause -> load -> reset caches -> tag -> resume (always) -> verify -> activate

A transport that loads beside what is served (an adapter) needs no pause: it loads, proves, and only then
activates. A server is never left paused: `resume` runs after any failure, an interrupt included, and its own
failure is reported beside the first one. A server that failed to load is resumed all the same: what it
serves then is unknown, but the error says so, and the environments do not hang.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from trainer.publish._protocol import InferenceServer, StagedWeights, WeightTransport
from trainer.publish._verification import Expectation, ServerVerifier
from trainer.publish.comparison import Comparison
from trainer.publish.errors import ServerFailure, VerificationFailed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServerOutcome:
    """What publishing one version did at one server."""

    server: str
    """Base URL, without credentials."""
    pause_seconds: float = 0.0
    """From the pause request to the resume reply: how long generation stood still."""
    load_seconds: float = 0.0
    """In the server's loading of the weights."""
    verify_seconds: float = 0.0
    """In asking the server for its log-probs, and judging them."""
    comparison: Comparison | None = None
    """Verification's numbers. None: not verified."""
    errors: tuple[ServerFailure, ...] = ()
    """What went wrong, in order. Empty: the version is served."""

    @property
    def is_disproved(self) -> bool:
        """Whether the server answered, and served something else."""
        return any(isinstance(error, VerificationFailed) for error in self.errors)


def publish_to_server(
    server: InferenceServer,
    transport: WeightTransport,
    staged: StagedWeights,
    *,
    verifier: ServerVerifier,
    expectation: Expectation | None,
    on_loaded: Callable[[], None] = lambda: None,
) -> ServerOutcome:
    """Bring staged weights into one server and prove it.

    Failures are returned, not raised, so that every server's outcome is known when the first is reported.

    Args:
        server: The server.
        transport: How the weights get into it.
        staged: The version.
        verifier: This server's.
        expectation: What it should say afterwards. None: do not verify.
        on_loaded: Called when environments may get the new weights from this server.
    """
    run = _Run(server, transport, staged, verifier, expectation)
    if expectation is not None:
        run.attempt(lambda: verifier.warm(staged.version))
    if run.needs_pause():
        run.update()
        if not run.errors:
            on_loaded()
        run.verify()
    else:
        run.load()
        run.verify()
    run.attempt(lambda: transport.activate(server, staged))
    if not run.errors:
        on_loaded()
    return run.outcome()


class _Run:
    """One publish to one server: what has been measured, and what has gone wrong, so far."""

    def __init__(
        self,
        server: InferenceServer,
        transport: WeightTransport,
        staged: StagedWeights,
        verifier: ServerVerifier,
        expectation: Expectation | None,
    ) -> None:
        self._server = server
        self._transport = transport
        self._staged = staged
        self._verifier = verifier
        self._expectation = expectation
        self._pause_seconds = 0.0
        self._load_seconds = 0.0
        self._verify_seconds = 0.0
        self._comparison: Comparison | None = None
        self.errors: list[ServerFailure] = []

    def attempt(self, action: Callable[[], None]) -> None:
        """Do it, unless something has failed already."""
        if not self.errors:
            self._collect(action)

    def needs_pause(self) -> bool:
        """Ask the transport, which may ask the server."""
        needed = True

        def ask() -> None:
            nonlocal needed
            needed = self._transport.needs_pause(self._server)

        self.attempt(ask)
        return needed

    def update(self) -> None:
        """Everything between pause and resume."""
        if self.errors:
            return
        version = self._staged.version
        started = time.monotonic()
        try:
            # Even a pause that failed may have paused: a reply can be lost on its way.
            self.attempt(lambda: self._server.pause(version))
            self.load()
            self.attempt(lambda: self._server.reset_caches(version))
            self.attempt(lambda: self._server.tag(version))
        finally:
            self._collect(lambda: self._server.resume(version))
        self._pause_seconds = time.monotonic() - started

    def load(self) -> None:
        """Bring the weights in."""
        started = time.monotonic()
        self.attempt(lambda: self._transport.load(self._server, self._staged))
        self._load_seconds = time.monotonic() - started

    def verify(self) -> None:
        """Compare what the server says with what it should say."""
        if self.errors or self._expectation is None:
            return
        started = time.monotonic()
        try:
            name = self._transport.served_name(self._server, self._staged)
            self._comparison = self._verifier.verify(self._expectation, served_name=name)
        except ServerFailure as error:
            self.errors.append(error)
            self._comparison = getattr(error, "comparison", None)
        self._verify_seconds = time.monotonic() - started

    def outcome(self) -> ServerOutcome:
        """What there is to tell."""
        return ServerOutcome(
            server=self._server.url,
            pause_seconds=self._pause_seconds,
            load_seconds=self._load_seconds,
            verify_seconds=self._verify_seconds,
            comparison=self._comparison,
            errors=tuple(self.errors),
        )

    def _collect(self, action: Callable[[], None]) -> None:
        try:
            action()
        except ServerFailure as error:
            logger.error("%s", error)  # noqa: TRY400 - an interrupt may be under way, which would hide it
            self.errors.append(error)

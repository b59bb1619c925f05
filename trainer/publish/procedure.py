"""Publishes one version to one server, in one order whatever the engine and the transport.

    pause -> load -> reset caches -> tag -> resume (always) -> verify -> activate

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

from trainer.publish.errors import ServerFailure
from trainer.publish.interfaces import InferenceServer, StagedWeights, WeightTransport
from trainer.publish.report import ServerOutcome
from trainer.publish.verification.compare_logprobs import Comparison
from trainer.publish.verification.verifier import Expectation, ServerVerifier, VerificationFailed

logger = logging.getLogger(__name__)


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
    comparison: Comparison | None = None
    errors: list[ServerFailure] = []
    seconds: dict[str, float] = {}
    with _collected(errors):
        if expectation is not None:
            verifier.warm()
        if transport.needs_pause(server):
            with _timed(seconds, "pause_seconds"):
                _update(server, transport, staged, seconds, errors)
            if not errors:
                on_loaded()
        else:
            with _timed(seconds, "load_seconds"):
                transport.load(server, staged)
        if not errors and expectation is not None:
            with _timed(seconds, "verify_seconds"):
                comparison = verifier.verify(expectation, served_name=transport.served_name(server))
        if not errors:
            transport.activate(server, staged)
            on_loaded()
    for error in errors:
        if isinstance(error, VerificationFailed):
            comparison = error.comparison
    return ServerOutcome(server=server.url, comparison=comparison, errors=tuple(errors), **seconds)


def _update(
    server: InferenceServer,
    transport: WeightTransport,
    staged: StagedWeights,
    seconds: dict[str, float],
    errors: list[ServerFailure],
) -> None:
    """Pause, load, reset caches, tag, resume."""
    try:
        with _collected(errors):
            # Even a pause that failed may have paused: a reply can be lost on its way.
            server.pause()
            with _timed(seconds, "load_seconds"):
                transport.load(server, staged)
            server.reset_caches()
            server.tag(staged.version)
    finally:
        with _collected(errors):
            server.resume()


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

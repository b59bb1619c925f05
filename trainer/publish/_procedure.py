"""The one order in which every server gets every version, whatever the engine and the transport.

    pause -> load -> reset caches -> tag -> resume (always) -> verify

A server is never left paused: `resume` runs after any failure, an interrupt included, and its own failure
is reported beside the first one. A server that failed to load is resumed all the same: what it serves then
is unknown, but the error says so, and the environments do not hang.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from trainer.publish._protocol import InferenceServer, StagedWeights, WeightTransport
from trainer.publish._verification import Expectation, ServerVerifier
from trainer.publish.comparison import Comparison
from trainer.publish.errors import ServerFailure

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServerOutcome:
    """What publishing one version did at one server."""

    server: str
    """Base URL, without credentials."""
    pause_seconds: float = 0.0
    """From the pause request to the resume reply: how long generation stood still."""
    load_seconds: float = 0.0
    """Of these, in the server's loading of the weights."""
    comparison: Comparison | None = None
    """Verification's numbers. None: not verified."""
    errors: tuple[ServerFailure, ...] = ()
    """What went wrong, in order. Empty: the version is served."""


def publish_to_server(
    server: InferenceServer,
    transport: WeightTransport,
    staged: StagedWeights,
    *,
    verifier: ServerVerifier,
    expectation: Expectation | None,
) -> ServerOutcome:
    """Bring staged weights into one server and prove it.

    Failures are returned, not raised, so that every server's outcome is known when the first is reported.

    Args:
        server: The server.
        transport: How the weights get into it.
        staged: The version.
        verifier: This server's.
        expectation: What it should say afterwards. None: do not verify.
    """
    errors: list[ServerFailure] = []
    started = time.monotonic()
    load_seconds = _update(server, transport, staged, errors)
    pause_seconds = time.monotonic() - started
    comparison = None
    if expectation is not None and not errors:
        try:
            comparison = verifier.verify(expectation)
        except ServerFailure as error:
            errors.append(error)
            comparison = getattr(error, "comparison", None)
    return ServerOutcome(
        server=server.url,
        pause_seconds=pause_seconds,
        load_seconds=load_seconds,
        comparison=comparison,
        errors=tuple(errors),
    )


def _update(
    server: InferenceServer, transport: WeightTransport, staged: StagedWeights, errors: list[ServerFailure]
) -> float:
    """Everything between pause and resume; returns the seconds that loading took."""
    version = staged.version
    load_seconds = 0.0
    try:
        # Even a pause that failed may have paused: a reply can be lost on its way.
        server.pause(version)
        started = time.monotonic()
        transport.load(server, staged)
        load_seconds = time.monotonic() - started
        server.reset_caches(version)
        server.tag(version)
    except ServerFailure as error:
        errors.append(error)
    finally:
        _collect(errors, lambda: server.resume(version))
    return load_seconds


def _collect(errors: list[ServerFailure], action: Callable[[], None]) -> None:
    try:
        action()
    except ServerFailure as error:
        logger.error("%s", error)  # noqa: TRY400 - an interrupt may be under way, which would hide it
        errors.append(error)

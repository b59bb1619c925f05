"""Asking one server what it serves, and remembering what was proven."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainer.publish._protocol import InferenceServer
from trainer.publish.comparison import (
    DEFAULT_DTYPE,
    TOLERANCES,
    Baseline,
    Comparison,
    Scores,
    compare,
)
from trainer.publish.errors import Phase, VerificationFailed

logger = logging.getLogger(__name__)


def tolerance_for(dtype: str | None, configured: float | None) -> float:
    """The tolerance in nats: as configured, else by the type of the published weights."""
    if configured is not None:
        return configured
    return TOLERANCES.get(dtype or DEFAULT_DTYPE, TOLERANCES[DEFAULT_DTYPE])


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What every server should say of a version."""

    version: int
    scores: Scores
    """The trainer's own log-probs of the probes."""
    tolerance: float


def make_expectation(
    score: Callable[[list[list[int]]], Scores], probes: list[list[int]], version: int, tolerance: float
) -> Expectation:
    """Score the probes with the trainer's own weights, as they are now."""
    return Expectation(version=version, scores=score(probes), tolerance=tolerance)


class ServerVerifier:
    """Verifies one server, again and again. Used from one thread at a time."""

    def __init__(self, server: InferenceServer, probes: list[list[int]]) -> None:
        self._server = server
        self._probes = probes
        self._baseline: Baseline | None = None

    def warm(self, version: int) -> None:
        """Bring the probes into the server's caches while it still has its old weights."""

    def compare(self, expectation: Expectation, *, served_name: str | None = None) -> Comparison:
        """Score the probes on the server and judge the numbers; a match may become the next baseline.

        Raises:
            ServerFailure: The server did not score the probes.
        """
        version = expectation.version
        served = self._server.score(self._probes, version, served_name=served_name)
        comparison = compare(
            served, expectation.scores, tolerance=expectation.tolerance, baseline=self._baseline
        )
        logger.info("%s: version %d: %s", self._server.url, version, comparison.describe())
        # Where old and new could not be told apart the old baseline stays: against it the movement adds up.
        if comparison.matches and (self._baseline is None or comparison.distinguishable):
            self._baseline = Baseline(version=version, expected=expectation.scores, served=served)
        return comparison

    def verify(self, expectation: Expectation, *, served_name: str | None = None) -> Comparison:
        """Prove that the server serves a version.

        Raises:
            VerificationFailed: It does not, by its numbers or by its own label.
            ServerFailure: The server did not score the probes.
        """
        version = expectation.version
        where: dict[str, Any] = {"server": self._server.url, "phase": Phase.VERIFY, "version": version}
        comparison = self.compare(expectation, served_name=served_name)
        if not comparison.matches:
            raise VerificationFailed(comparison.describe(), comparison=comparison, **where)
        if served_name is not None:  # an adapter is labelled when it is activated, after the proof
            return comparison
        label = self._server.weight_version(version)
        if label is not None and label != str(version):
            raise VerificationFailed(
                f"the log-probs agree, but the server labels its weights {label!r}; does another trainer "
                "publish to it?",
                **where,
            )
        return comparison

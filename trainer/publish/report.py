"""Reports what a publish did at every server and in all, for the log and for the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from trainer.publish.errors import PublishError, ServerFailure
from trainer.publish.verification.compare_logprobs import Comparison
from trainer.publish.verification.verifier import VerificationFailed


class PublishFailed(PublishError):  # noqa: N818
    """Publishing failed at one server in several ways, or at some of several servers.

    Attributes:
        outcomes: What happened at every server, the successful ones included.
    """

    def __init__(self, version: int, outcomes: Sequence[ServerOutcome]) -> None:
        self.version = version
        self.outcomes = tuple(outcomes)
        failed = [outcome for outcome in self.outcomes if outcome.errors]
        lines = [f"version {version} is not served by {len(failed)} of {len(self.outcomes)} servers:"]
        for outcome in self.outcomes:
            lines += [f"  - {error}" for error in outcome.errors] or [f"  - {outcome.server}: served"]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[Self], tuple[int, tuple[ServerOutcome, ...]]]:
        return type(self), (self.version, self.outcomes)


@dataclass(frozen=True, kw_only=True)
class ServerOutcome:
    """Reports what publishing one version did at one server."""

    server: str
    """Base URL, without credentials."""
    prepare_seconds: float = 0.0
    """In the server's reading and checking of a delta, while it served the version before; or 0."""
    pause_seconds: float = 0.0
    """From the pause request to the resume reply: how long generation stood still."""
    load_seconds: float = 0.0
    """In the server's loading of the weights."""
    verify_seconds: float = 0.0
    """In asking the server for its log-probs, and judging them."""
    comparison: Comparison | None = None
    """Verification's numbers. None: not verified."""
    errors: tuple[ServerFailure, ...] = ()
    """Failures, in order. Empty: the version is served."""

    @property
    def is_disproved(self) -> bool:
        """Tell whether the server answered, and served something else."""
        return any(isinstance(error, VerificationFailed) for error in self.errors)


@dataclass(frozen=True, kw_only=True)
class PublishReport:
    """Reports a version that the servers took. Times are in seconds."""

    version: int
    already_served: bool = False
    """The servers proved to have these weights before anything was sent."""
    verified: bool
    """Whether that was proven by log-probs, or only accepted by the servers."""
    capture_seconds: float = 0.0
    """Copying the weights and scoring the probes with them: how long training stood still."""
    stage_seconds: float = 0.0
    """Writing the weights; generation and, with `publish.overlap`, training go on meanwhile."""
    total_seconds: float = 0.0
    """From the call to the last proof."""
    attempts: int = 1
    """Max publish attempts over servers."""
    weight_bytes: int = 0
    """Bytes sent or written."""
    servers: tuple[ServerOutcome, ...]
    """The servers that have this version."""
    lost: tuple[ServerOutcome, ...] = ()
    """The servers that the run goes on without, with what they failed on."""
    oldest_version: int | None = None
    """The oldest version that a server may still serve; None: the run does not know one."""

    @property
    def pause_seconds(self) -> float:
        """Seconds for which generation stood still at the server where it stood longest."""
        return max(outcome.pause_seconds for outcome in self.servers)

    def metrics(self) -> dict[str, float]:
        """Numbers for metrics.jsonl and the trackers; differences in nats, the worst server's."""
        numbers: dict[str, float] = {
            "publish/version": self.version,
            "publish/verified": float(self.verified),
            "publish/capture_seconds": self.capture_seconds,
            "publish/stage_seconds": self.stage_seconds,
            "publish/prepare_seconds": max(outcome.prepare_seconds for outcome in self.servers),
            "publish/pause_seconds": self.pause_seconds,
            "publish/load_seconds": max(outcome.load_seconds for outcome in self.servers),
            "publish/verify_seconds": max(outcome.verify_seconds for outcome in self.servers),
            "publish/total_seconds": self.total_seconds,
            "publish/attempts": self.attempts,
            "publish/weight_bytes": self.weight_bytes,
            "publish/servers": len(self.servers),
            "publish/servers_lost": len(self.lost),
        }
        if self.oldest_version is not None:
            numbers["publish/version_lag"] = self.version - self.oldest_version
        comparisons = [outcome.comparison for outcome in self.servers if outcome.comparison is not None]
        if comparisons:
            numbers["publish/mean_difference"] = max(each.mean_difference for each in comparisons)
            numbers["publish/max_difference"] = max(each.max_difference for each in comparisons)
            numbers["publish/distinguishable"] = float(all(each.distinguishable for each in comparisons))
        fractions = [each.fraction for each in comparisons if each.fraction is not None]
        if fractions:
            numbers["publish/fraction_arrived"] = min(fractions)
        return numbers

    def describe(self) -> str:
        """Describe it in one line for the log."""
        how = "was served already" if self.already_served else "published"
        proof = "verified" if self.verified else "not verified"
        numbers = self.metrics()
        if "publish/mean_difference" in numbers:
            proof += f", log-probs within {numbers['publish/mean_difference']:.2g} nats on average"
        if self.lost:
            proof += f"; without {', '.join(outcome.server for outcome in self.lost)}"
        return (
            f"version {self.version} {how} in {self.total_seconds:.1f} s "
            f"(training waited {self.capture_seconds:.1f} s, generation {self.pause_seconds:.1f} s), {proof}"
        )

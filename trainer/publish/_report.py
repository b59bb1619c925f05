"""What a publish did, for the log and for the metrics."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.publish._procedure import ServerOutcome


@dataclass(frozen=True, kw_only=True)
class PublishReport:
    """A version that the servers took. Times are in seconds."""

    version: int
    already_served: bool = False
    """The servers proved to have these weights before anything was sent."""
    verified: bool
    """Whether that was proven by log-probs, or only accepted by the servers."""
    capture_seconds: float = 0.0
    """Copying the weights and scoring the probes with them: how long training stood still."""
    stage_seconds: float = 0.0
    """Writing the weights; generation and, with `publish.overlap`, training go on meanwhile."""
    pause_seconds: float = 0.0
    """How long generation stood still at the server where it stood longest."""
    total_seconds: float
    """From the call to the last proof."""
    attempts: int = 1
    """How often the server that failed most often was published to."""
    weight_bytes: int = 0
    """What travelled."""
    servers: tuple[ServerOutcome, ...]
    """The servers that have this version."""
    lost: tuple[ServerOutcome, ...] = ()
    """The servers that the run goes on without, with what they failed on."""
    oldest_version: int | None = None
    """The oldest version that a server may still serve; None: the run does not know one."""

    def metrics(self) -> dict[str, float]:
        """Numbers for metrics.jsonl and the trackers; differences in nats, the worst server's."""
        numbers: dict[str, float] = {
            "publish/version": self.version,
            "publish/verified": float(self.verified),
            "publish/capture_seconds": self.capture_seconds,
            "publish/stage_seconds": self.stage_seconds,
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
        """One line for the log."""
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

"""What a publish did, for the log and for the metrics."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.publish._procedure import ServerOutcome


@dataclass(frozen=True, kw_only=True)
class PublishReport:
    """A version that all servers took. Times are in seconds."""

    version: int
    already_served: bool
    """The servers proved to have these weights before anything was sent."""
    verified: bool
    """Whether that was proven by log-probs, or only accepted by the servers."""
    stage_seconds: float
    """Writing the weights and scoring the probes with them; generation goes on meanwhile."""
    pause_seconds: float
    """How long generation stood still at the server where it stood longest."""
    total_seconds: float
    """From the call to the last proof."""
    servers: tuple[ServerOutcome, ...]

    def metrics(self) -> dict[str, float]:
        """Numbers for metrics.jsonl and the trackers; differences in nats, the worst server's."""
        numbers: dict[str, float] = {
            "publish/version": self.version,
            "publish/verified": float(self.verified),
            "publish/stage_seconds": self.stage_seconds,
            "publish/pause_seconds": self.pause_seconds,
            "publish/total_seconds": self.total_seconds,
        }
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
        return (
            f"version {self.version} {how} in {self.total_seconds:.1f} s "
            f"(paused {self.pause_seconds:.1f} s), {proof}"
        )

"""The entropy's part in the loss, by a fixed or an adaptive coefficient."""

from __future__ import annotations

import math

from torch import Tensor

from trainer.config import LossSettings
from trainer.losses import LossInputs


class EntropyBonus:
    """Rewards the policy's entropy, by a fixed coefficient or towards a target.

    ``loss - coefficient * sum_t mask_t H_t / denominator``. With a target, after every step the coefficient
    rises by `loss.entropy_step` if the step's mean entropy was below it and falls by as much (not below 0) if
    it was above, and it counts in steps after an entropy at or below the target only.
    Source: He et al. 2025, Skywork Open Reasoner 1 (arXiv 2505.22312), with the entropy of the step before.

    Args:
        settings: Section `loss`.
        state: What `state` gave after the step that the run goes on from; empty for a new run.
    """

    def __init__(self, settings: LossSettings, state: dict[str, float]) -> None:
        self._settings = settings
        self._coefficient = settings.entropy_coefficient
        self._entropy = -math.inf
        if settings.entropy_target is not None and state:
            self._entropy = state["entropy"]
            if state["first"] == settings.entropy_coefficient:  # another one begins anew
                self._coefficient = state["coefficient"]

    @property
    def state(self) -> dict[str, float]:
        """State for a checkpoint; empty where nothing is adapted."""
        if self._settings.entropy_target is None or math.isinf(self._entropy):
            return {}
        first = self._settings.entropy_coefficient
        return {"first": first, "coefficient": self._coefficient, "entropy": self._entropy}

    @property
    def coefficient(self) -> float:
        """That of the step to come, 0.0 or more."""
        target = self._settings.entropy_target
        return 0.0 if target is not None and self._entropy > target else self._coefficient

    def observe(self, entropy: float) -> None:
        """Take in the mean entropy of a step that was applied, in nats."""
        target = self._settings.entropy_target
        if target is None:
            return
        self._entropy = entropy
        change = self._settings.entropy_step if entropy < target else -self._settings.entropy_step
        self._coefficient = max(0.0, self._coefficient + change)

    def add(self, loss: Tensor, inputs: LossInputs, entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Subtract the bonus from a micro-batch's loss; returns it, and sums for the metrics."""
        if not self._settings.rewards_entropy:
            return loss, {}
        metrics = {"entropy_coefficient": self.coefficient * inputs.mask.sum()}
        return (loss - self.coefficient * inputs.reduce(entropy) if self.coefficient else loss), metrics

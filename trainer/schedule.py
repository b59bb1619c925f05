"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from trainer.config import OptimizerSettings


def learning_rate(settings: OptimizerSettings, step: int, total_steps: int) -> float:
    """Learning rate of an optimizer step.

    Rises linearly over `warmup_steps`, from 1/warmup_steps of the full rate at step 0; then stays, or
    follows half a cosine to `minimum_learning_rate_ratio` at `total_steps` (Loshchilov and Hutter, 2017).

    Args:
        settings: The optimizer's settings.
        step: Optimizer steps done before this one, from 0.
        total_steps: Steps of the whole run.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    span = max(1, total_steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / span)
    floor = settings.minimum_learning_rate_ratio
    return settings.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))

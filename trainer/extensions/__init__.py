"""Losses and advantage estimators that a setting names: ours by a word, yours as ``module:function``.

One mechanism for both: a decorated function, its options as a pydantic model beside it, and what it needs of
a batch declared with it. ``docs/extending.md`` has a complete example of each. Nothing here loads torch.

::

    loss.name: ppo_clip            BUILT_IN_LOSSES ─┐
    loss.name: my_module:my_loss  ──────────────────┴─> import ─> Loss ─> bind(options) ─> BoundLoss(inputs)
"""

from trainer.extensions._closest import closest_name, same_name
from trainer.extensions._estimator import (
    BUILT_IN_ESTIMATORS,
    AdvantageEstimator,
    BoundEstimator,
    GroupScores,
    OverBatch,
    advantage_estimator,
)
from trainer.extensions._extension import BUILT_IN_LOSSES, BoundLoss, Extension, Loss, loss
from trainer.options import Options

__all__ = [
    "BUILT_IN_ESTIMATORS",
    "BUILT_IN_LOSSES",
    "AdvantageEstimator",
    "BoundEstimator",
    "BoundLoss",
    "Extension",
    "GroupScores",
    "Loss",
    "Options",
    "OverBatch",
    "advantage_estimator",
    "closest_name",
    "loss",
    "same_name",
]

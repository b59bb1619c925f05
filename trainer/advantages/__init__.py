"""From the scores of a group to one advantage per token, and from there to the advantages of a step.

Non-goals: nothing here touches the model, talks to other processes (a reducer is injected), or decides which
groups are skipped.

::

    [ScoredGroup] ─> token_advantages ─> [N], a whole step ─> AdvantageNormalizer ─> clip_advantages

Every definition is in ``docs/losses.md``.
"""

from __future__ import annotations

from trainer.advantages._estimators import (
    ESTIMATOR_NAMES,
    EstimatorName,
    group_center,
    group_norm,
    has_spread,
    leave_one_out,
    raw,
    resolve_estimator,
)
from trainer.advantages._group import has_signal, sequence_advantages, tensor_of, token_advantages
from trainer.advantages._step import (
    AdvantageMoments,
    AdvantageNormalizer,
    NormalizationMode,
    clip_advantages,
    measure_advantages,
)

__all__ = [
    "ESTIMATOR_NAMES",
    "AdvantageMoments",
    "AdvantageNormalizer",
    "EstimatorName",
    "NormalizationMode",
    "clip_advantages",
    "group_center",
    "group_norm",
    "has_signal",
    "has_spread",
    "leave_one_out",
    "measure_advantages",
    "raw",
    "resolve_estimator",
    "sequence_advantages",
    "tensor_of",
    "token_advantages",
]

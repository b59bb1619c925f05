"""From the scores of a group to one advantage per token, and from there to the advantages of a step.

Non-goals: nothing here touches the model, talks to other processes (each has the whole step), or decides
which groups are skipped.

::

    [ScoredGroup] ─> token_advantages ─> [N], a whole step ─> AdvantageNormalizer

Every definition is in ``docs/losses.md``.
"""

from __future__ import annotations

from trainer.samples.advantages.estimators import (
    group_center,
    group_norm,
    has_spread,
    leave_one_out,
    raw,
)
from trainer.samples.advantages.normalizer import AdvantageNormalizer, NormalizationMode
from trainer.samples.advantages.per_token import (
    Estimator,
    has_signal,
    sequence_advantages,
    tensor_of,
    token_advantages,
)

__all__ = [
    "AdvantageNormalizer",
    "Estimator",
    "NormalizationMode",
    "group_center",
    "group_norm",
    "has_signal",
    "has_spread",
    "leave_one_out",
    "raw",
    "sequence_advantages",
    "tensor_of",
    "token_advantages",
]

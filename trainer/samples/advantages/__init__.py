"""From the scores of a group to one advantage per token, and from there to the advantages of a step.

Non-goals: nothing here touches the model, talks to other processes (each has the whole step), or decides
which groups are skipped.

::

    [ScoredGroup] ─> token_advantages ─> [N], a whole step ─> AdvantageNormalizer

Every definition is in ``docs/advantages.md``.
"""

from __future__ import annotations

from trainer.samples.advantages.estimators import (
    batch_std,
    gpg,
    group_center,
    group_norm,
    has_spread,
    leave_one_out,
    length_shaping,
    maxrl,
    opo,
    pass_at_k,
    raw,
    reinforce_plus_plus_baseline,
)
from trainer.samples.advantages.normalizer import AdvantageNormalizer, NormalizationMode
from trainer.samples.advantages.per_token import (
    has_signal,
    is_set_to_zero,
    is_supervised,
    sequence_advantages,
    tensor_of,
    token_advantages,
)

__all__ = [
    "AdvantageNormalizer",
    "NormalizationMode",
    "batch_std",
    "gpg",
    "group_center",
    "group_norm",
    "has_signal",
    "has_spread",
    "is_set_to_zero",
    "is_supervised",
    "leave_one_out",
    "length_shaping",
    "maxrl",
    "opo",
    "pass_at_k",
    "raw",
    "reinforce_plus_plus_baseline",
    "sequence_advantages",
    "tensor_of",
    "token_advantages",
]

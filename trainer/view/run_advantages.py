"""Computes the advantages of a recorded batch as its run did, from the run's settings in its checkpoint.

A stranger's run may name any importable module as its estimator: only built-in ones are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Final

from schemas import ScoredGroup
from trainer.errors import TrainerError

_SETTINGS: Final = ("advantage_estimator", "advantage_options", "advantage_normalization", "advantage_clip")


def batch_advantages(
    groups: Sequence[ScoredGroup], configuration: Mapping[str, Any]
) -> tuple[list[list[float]] | None, str]:
    """Compute one advantage a token for each group of a batch.

    Args:
        groups: Those that were trained on, the whole batch.
        configuration: The run's; may be empty.

    Returns:
        By group, one a token, its sequences one after another; None where it cannot be told. And a note on
        how they come about, or why they do not.
    """
    from trainer.config import DataSettings
    from trainer.extensions import BUILT_IN_ESTIMATORS
    from trainer.samples.advantages import AdvantageNormalizer, token_advantages
    from trainer.samples.sample import token_columns

    given = configuration.get("data", {})
    name = given.get("advantage_estimator")
    if name not in BUILT_IN_ESTIMATORS:
        return None, (
            "this run has no checkpoint yet, so its estimator is not known"
            if name is None
            else f"the run's estimator {name} is not one of ours, and is not run here"
        )
    try:
        data = DataSettings.model_validate({key: given[key] for key in _SETTINGS if key in given})
        if not groups:
            return [], name
        columns = token_columns(groups)
        advantages = token_advantages(groups, estimator=data.bound_estimator)
        advantages = advantages.masked_fill(columns.loss_mask == 0, 0.0)
        normalization = data.advantage_normalization
        if normalization == "batch":
            advantages = AdvantageNormalizer("batch")(advantages, columns.loss_mask)
        if data.advantage_clip is not None and normalization != "global":
            advantages = advantages.clamp(*data.advantage_clip)
    except (TrainerError, ValueError) as error:
        return None, f"the advantages cannot be computed: {error}"
    note = f"{name}" + (", over the batch's deviation" if normalization == "batch" else "")
    if normalization == "global":
        note += ", before the division by the deviation of all steps so far, and any clip after it"
    if given.get("reward_kl_coefficient"):
        note += ", from scores without the KL to the reference that the run takes off"
    if configuration.get("distillation", {}).get("mode", "none") != "none":
        note += ", without the teacher's part"
    values: list[float] = advantages.tolist()
    ends = accumulate(group.token_count for group in groups)
    return [values[start:end] for start, end in pairwise([0, *ends])], note

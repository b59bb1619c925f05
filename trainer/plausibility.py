"""Values that are valid on the wire and still nothing to train on: one of them would decide the whole step.

The wire's own rules (types, lengths, finite numbers) are in `schemas`; what model and loss cannot take is in
`trainer.samples`. Here is what would be computed without an error and be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from schemas import IGNORE_INDEX, ScoredGroup
from trainer.advantages import EstimatorName, sequence_advantages

LOWEST_TEMPERATURE: Final = 0.01
"""vLLM raises any positive temperature below this one to it, because logits divided by less overflow."""

HIGHEST_TEMPERATURE: Final = 100.0
"""Above it every token is about equally likely; no sampler is run like that on purpose."""


def implausible_reason(
    group: ScoredGroup,
    *,
    estimator: EstimatorName,
    uses_temperature: bool,
    advantage_limit: float | None,
) -> str | None:
    """Say why a valid group should not be trained on; None if it may.

    Args:
        group: A validated group.
        estimator: How scores become advantages where the group has none of its own.
        uses_temperature: Whether the loss divides logits by the sampling temperature.
        advantage_limit: Largest magnitude of an advantage at a trained token. None: any.
    """
    return (
        _override_reason(group)
        or (_temperature_reason(group) if uses_temperature else None)
        or (None if advantage_limit is None else _advantage_reason(group, estimator, advantage_limit))
    )


def _override_reason(group: ScoredGroup) -> str | None:
    """`set_advantage_to_zero` must be true, false, 1, 0 or null: the text "false" would count as true."""
    for index, override in enumerate(group.overrides or ()):
        value = override.get("set_advantage_to_zero")
        if value is not None and not (isinstance(value, bool | int) and value in (0, 1)):
            return f"overrides[{index}] has set_advantage_to_zero {_quote(value)}; it must be true or false"
    return None


def _temperature_reason(group: ScoredGroup) -> str | None:
    """The nearest word on each sequence's temperature must be one that a sampler can have used."""
    for index in range(group.sequence_count):
        override = group.overrides[index] if group.overrides is not None else None
        named: tuple[tuple[str, Mapping[str, Any] | None], ...] = (
            (f"overrides[{index}]", override),
            ("generation_params", group.generation_params),
            ("group_overrides", group.group_overrides),
        )
        for name, source in named:
            value = source.get("temperature") if source is not None else None
            if value is None:
                continue
            if not _is_temperature(value):
                return (
                    f"{name} has temperature {_quote(value)}; it must be 0 (greedy) or a number from "
                    f"{LOWEST_TEMPERATURE:g} to {HIGHEST_TEMPERATURE:g}"
                )
            break
    return None


def _is_temperature(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value == 0 or LOWEST_TEMPERATURE <= value <= HIGHEST_TEMPERATURE


def _advantage_reason(group: ScoredGroup, estimator: EstimatorName, limit: float) -> str | None:
    if group.advantages is None:
        for index, advantage in enumerate(sequence_advantages(group, estimator=estimator)):
            if abs(advantage) > limit:
                return _too_large(f"the advantage of sequence {index}", advantage, limit)
        return None
    for index, row in enumerate(group.advantages):
        if max(row) <= limit and min(row) >= -limit:
            continue  # no Python expression for each of half a million tokens
        for column, (advantage, mask) in enumerate(zip(row, group.masks[index], strict=True)):
            if abs(advantage) > limit and mask != IGNORE_INDEX:
                return _too_large(f"advantages[{index}][{column}]", advantage, limit)
    return None


def _too_large(what: str, advantage: float, limit: float) -> str:
    return f"{what} is {advantage:g}, beyond {limit:g} (data.advantage_limit): it would decide the whole step"


def _quote(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."

"""Advantage estimators that a setting names: from the scores of a group, or of a batch, to advantages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from trainer.errors import ConfigurationError
from trainer.extensions._extension import Extension, O, called
from trainer.options import ESTIMATOR_OPTIONS, Options

BUILT_IN_ESTIMATORS: Mapping[str, str] = MappingProxyType(
    {name: f"trainer.samples.advantages:{name}" for name in ESTIMATOR_OPTIONS}
)
NAMES_ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        "grpo": "group_norm",
        "dr_grpo": "group_center",
        "rloo": "leave_one_out",
        "reinforce": "raw",
        "reinforce++": "reinforce_plus_plus_baseline",
        "reinforce_plus_plus": "reinforce_plus_plus_baseline",
        "grpo_passk": "pass_at_k",
        "pass@k": "pass_at_k",
        "max_rl": "maxrl",
    }
)
"""Names of our estimators in papers and other trainers, for the message on a name that is none of ours."""


@dataclass(frozen=True, kw_only=True)
class GroupScores:
    """Scores and lengths of a group of n sequences, for an advantage estimator."""

    scores: Sequence[float]
    """[n], as the environment sent them: finite."""
    trained_tokens: Sequence[int]
    """[n]: how many tokens of each sequence are trained on, its length for an estimator."""


OverBatch = Callable[[Sequence[GroupScores], Sequence[Sequence[float]], O], list[list[float]]]
"""Second half of an advantage estimator; see `advantage_estimator`."""


class AdvantageEstimator(Extension[O]):
    """An advantage estimator; see `advantage_estimator`."""

    noun = "advantage estimator"
    setting = "data.advantage_estimator"
    decorator = "trainer.extensions.advantage_estimator()"
    built_in = BUILT_IN_ESTIMATORS
    names_elsewhere = NAMES_ELSEWHERE

    def __init__(
        self,
        function: Callable[[GroupScores, O], list[float]],
        options: type[O],
        over_batch: OverBatch[O] | None = None,
    ) -> None:
        super().__init__(function, options)
        self._over_batch = over_batch

    def __call__(self, group: GroupScores | Sequence[float], **options: Any) -> list[float]:
        """Estimate a batch of one group with options by name, for direct use.

        Args:
            group: Plain scores stand for sequences of one token each.
            **options: By name.

        Raises:
            ConfigurationError: An option or its value is not allowed.
        """
        return self.bind(self.called_options(options)).of_batch([_as_group(group)])[0]

    def bind(self, options: O) -> BoundEstimator:
        """Give it its options."""
        return BoundEstimator(
            name=self.__name__, function=self.function, options=options, over_batch=self._over_batch
        )


@dataclass(frozen=True, kw_only=True)
class BoundEstimator:
    """An advantage estimator with its options."""

    name: str
    function: Callable[[GroupScores, Any], list[float]]
    options: Options
    over_batch: OverBatch[Any] | None = None

    def __call__(self, group: GroupScores | Sequence[float]) -> list[float]:
        """Return one advantage per sequence of a group, before anything is taken over the batch.

        Raises:
            ConfigurationError: The function returned something else, or, if it is a user's own, raised.
        """
        group = _as_group(group)
        advantages = called(self._what, self.function, group, self.options)
        self._refuse_other_than_one_each([group], [advantages])
        return advantages

    def of_batch(self, groups: Sequence[GroupScores]) -> list[list[float]]:
        """Return one advantage per sequence of each group of a batch.

        Raises:
            ConfigurationError: A function returned something else, or, if it is a user's own, raised.
        """
        advantages = [self(group) for group in groups]
        if self.over_batch is None or not groups:
            return advantages
        advantages = called(self._what, self.over_batch, groups, advantages, self.options)
        self._refuse_other_than_one_each(groups, advantages)
        for of_group in advantages:
            for advantage in of_group:
                if not math.isfinite(advantage):
                    raise ConfigurationError(f"{self._what} made {advantage} of a batch of finite advantages")
        return advantages

    @property
    def _what(self) -> str:
        return f"the advantage estimator {self.name}"

    def _refuse_other_than_one_each(
        self, groups: Sequence[GroupScores], advantages: Sequence[Sequence[float]]
    ) -> None:
        if len(advantages) != len(groups):
            raise ConfigurationError(
                f"{self._what} returned advantages for {len(advantages)} groups of a batch of {len(groups)}; "
                "it returns a list for each"
            )
        for group, of_group in zip(groups, advantages, strict=True):
            if len(of_group) != len(group.scores):
                raise ConfigurationError(
                    f"{self._what} returned {len(of_group)} advantages for a group of "
                    f"{len(group.scores)} sequences; it returns one for each"
                )


def _as_group(group: GroupScores | Sequence[float]) -> GroupScores:
    if isinstance(group, GroupScores):
        return group
    return GroupScores(scores=group, trained_tokens=[1] * len(group))


def advantage_estimator(
    options: type[O] = Options,  # type: ignore[assignment]
    *,
    over_batch: OverBatch[O] | None = None,
) -> Callable[[Callable[[GroupScores, O], list[float]]], AdvantageEstimator[O]]:
    """Make an advantage estimator of a function of `GroupScores` and its options; it must be pure.

    Args:
        options: The model of its options.
        over_batch: What is done to the advantages once those of the whole batch are there, scaling by a
            standard deviation over the batch, say: a pure function of the batch's groups, the function's
            advantages for each, and the options, which returns a list for each group again. Every process
            has the whole batch. Groups with token-level advantages of their own are not in it.
    """
    return lambda function: AdvantageEstimator(function, options, over_batch)

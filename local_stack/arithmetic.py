"""The demonstration task: additions of two numbers, and how a reply to one is scored.

Pure and light: no Atropos, no tensors, no files. `local_stack.environment` wraps it as an Atropos
environment; every other part may import it freely.

Non-goals: being a hard task. It is small enough that a 135M-parameter model learns it on two CPU cores in
minutes, and graded, so that a model which answers in words first learns to answer with a number at all.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

LARGEST_ADDEND = 20
"""Both addends lie in 1..LARGEST_ADDEND: 400 ordered pairs in all."""
HELD_OUT_COUNT = 48
"""Pairs that are never trained on."""
SCORE_RIGHT = 1.0
"""The last number of the reply is the sum."""
SCORE_A_NUMBER = 0.1
"""The reply holds a number, but the last one is not the sum."""
SCORE_NO_NUMBER = 0.0

# Whatever the seed of a run, the same pairs are held out: scores of different runs can be compared.
_HELD_OUT_SEED = 20
# Thousands separators are part of a number ("1,234"); a full stop that ends a sentence is not.
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


@dataclass(frozen=True, order=True)
class Addition:
    """One problem: `Addition(7, 5)` asks "What is 7+5? Answer with one number." and expects 12."""

    first: int
    second: int

    @property
    def question(self) -> str:
        """The question to the model."""
        return f"What is {self.first}+{self.second}? Answer with one number."

    @property
    def answer(self) -> int:
        """The right answer."""
        return self.first + self.second

    def score(self, reply: str) -> float:
        """Score a reply: 1.0 if its last number is the sum, 0.1 if it holds a number at all, else 0.0.

        >>> Addition(7, 5).score("7+5 is 12."), Addition(7, 5).score("13"), Addition(7, 5).score("twelve")
        (1.0, 0.1, 0.0)
        """
        numbers = _NUMBER.findall(reply)
        if not numbers:
            return SCORE_NO_NUMBER
        return SCORE_RIGHT if float(numbers[-1].replace(",", "")) == self.answer else SCORE_A_NUMBER


def split_problems() -> tuple[list[Addition], list[Addition]]:
    """Return (training problems, held-out problems): disjoint, always the same, together all 400."""
    everything = [
        Addition(first, second)
        for first in range(1, LARGEST_ADDEND + 1)
        for second in range(1, LARGEST_ADDEND + 1)
    ]
    random.Random(_HELD_OUT_SEED).shuffle(everything)  # noqa: S311 - a shuffle, not a secret
    return everything[HELD_OUT_COUNT:], everything[:HELD_OUT_COUNT]


def training_order(seed: int) -> Iterator[Addition]:
    """Yield training problems for ever: each pass over all of them is shuffled anew, by `seed`."""
    generator = random.Random(seed)  # noqa: S311 - an order of problems, not a secret
    training, _ = split_problems()
    while True:
        yield from generator.sample(training, len(training))


def share_right(scores: list[float]) -> float:
    """Return the share of exactly right replies in `scores`, 0.0 .. 1.0.

    Raises:
        ValueError: There are no scores.
    """
    if not scores:
        raise ValueError("no replies to judge: the evaluation produced no samples")
    return sum(score == SCORE_RIGHT for score in scores) / len(scores)

"""The batches that every contender trains on, as the Atropos API would send them.

Deterministic: one seed, one batch. Tokens are random (timing does not depend on what they say), scores are
spread so that no sequence goes without an advantage, and the sampler's log-probs are the model's own, moved
by at most `SAMPLER_NOISE` nats: importance ratios stay within 0.95 to 1.05, where no PPO clip is active and
the contenders' losses are one and the same function.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

IGNORED = -100
SAMPLER_NOISE = 0.05
GROUPS = 2
SEQUENCES = 8

Group = dict[str, Any]
Scorer = Callable[[list[int]], Sequence[float]]
"""Log-prob of every token of a sequence but the first, in nats."""


@dataclass(frozen=True)
class Row:
    """One sequence with all that a padding trainer needs; everything token-aligned."""

    tokens: list[int]
    trained: list[bool]
    sampler_logprobs: list[float]
    advantage: float
    """(score - mean) / standard deviation over its group."""
    prompt_length: int
    """Tokens before the first trained one."""


@dataclass(frozen=True)
class Case:
    """One batch."""

    name: str
    title: str
    groups: list[Group]
    """Objects of the wire: tokens, masks, scores, inference_logprobs, generation_params."""

    @cached_property
    def body(self) -> bytes:
        """The reply that `GET /batch` would give."""
        return json.dumps({"batch": self.groups}).encode()

    @cached_property
    def rows(self) -> list[Row]:
        """All sequences, group by group."""
        return [row for group in self.groups for row in _rows(group)]

    @cached_property
    def folded(self) -> list[FoldedGroup]:
        """The unique tokens of each group."""
        return [_fold(group) for group in self.groups]

    @property
    def counts(self) -> dict[str, int]:
        """Sizes that do not depend on who computes."""
        return {
            "groups": len(self.groups),
            "sequences": len(self.rows),
            "sequence_tokens": sum(len(row.tokens) for row in self.rows),
            "unique_tokens": sum(len(group.tokens) for group in self.folded),
            "trained_tokens": sum(sum(row.trained) for row in self.rows),
            "predictions": sum(len(group.predict_from) for group in self.folded),
            "attended_pairs": sum(group.attended_pairs for group in self.folded),
        }


@dataclass(frozen=True)
class FoldedGroup:
    """A group's tokens, each prefix once."""

    tokens: list[int]
    predict_from: list[int]
    """Indices into `tokens` from which at least one trained token is predicted, ascending."""
    attended_pairs: int
    """Sum over the tokens of how many they attend to: their ancestors and themselves."""


def _fold(group: Group) -> FoldedGroup:
    """Walk the group's sequences down a tree keyed by (parent, token)."""
    children: dict[tuple[int, int], int] = {}
    tokens: list[int] = []
    predict_from: set[int] = set()
    attended_pairs = 0
    for sequence, mask in zip(group["tokens"], group["masks"], strict=True):
        node = -1
        for depth, (token, label) in enumerate(zip(sequence, mask, strict=True)):
            if label != IGNORED and depth > 0:
                predict_from.add(node)
            if (node, token) not in children:
                children[node, token] = len(tokens)
                tokens.append(token)
                attended_pairs += depth + 1
            node = children[node, token]
    return FoldedGroup(tokens, sorted(predict_from), attended_pairs)


def _rows(group: Group) -> list[Row]:
    scores = group["scores"]
    mean = sum(scores) / len(scores)
    deviation = (sum((score - mean) ** 2 for score in scores) / len(scores)) ** 0.5
    rows = []
    for index, (tokens, mask) in enumerate(zip(group["tokens"], group["masks"], strict=True)):
        trained = [label != IGNORED for label in mask]
        advantage = (scores[index] - mean) / deviation
        logprobs = group["inference_logprobs"][index]
        rows.append(Row(tokens, trained, logprobs, advantage, prompt_length=trained.index(True)))
    return rows


@dataclass(frozen=True)
class Shape:
    """Shape of a case's batch: what one group looks like, and how many there are."""

    title: str
    draw: Callable[[random.Random, Callable[[int], list[int]]], list[tuple[list[int], list[bool]]]]
    """From random numbers and a source of random tokens to (tokens, trained) of each sequence."""
    groups: int = GROUPS


def answers(prompt: int, shortest: int, longest: int, *, groups: int = GROUPS) -> Shape:
    """Eight answers of random length to one prompt."""

    def draw(
        generator: random.Random, tokens: Callable[[int], list[int]]
    ) -> list[tuple[list[int], list[bool]]]:
        start = tokens(prompt)
        lengths = [generator.randint(shortest, longest) for _ in range(SEQUENCES)]
        return [(start + tokens(length), [False] * prompt + [True] * length) for length in lengths]

    length = str(longest) if shortest == longest else f"{shortest}-{longest}"
    return Shape(f"{groups} x {SEQUENCES}, prompt {prompt:,}, completions {length}", draw, groups)


def conversations(prompt: int, shortest: int, longest: int, reply: int) -> Shape:
    """Three turns; before each, every conversation so far is continued in two ways.

    A turn is `shortest` to `longest` trained tokens and `reply` tokens of the environment's answer, which
    are not trained on and differ from branch to branch.
    """

    def draw(
        generator: random.Random, tokens: Callable[[int], list[int]]
    ) -> list[tuple[list[int], list[bool]]]:
        open_: list[tuple[list[int], list[bool]]] = [(tokens(prompt), [False] * prompt)]
        while len(open_) < SEQUENCES:
            longer = []
            for history, trained in open_:
                for _ in range(2):
                    length = generator.randint(shortest, longest)
                    turn, flags = tokens(length), [True] * length
                    if 2 * len(open_) < SEQUENCES:
                        turn, flags = turn + tokens(reply), flags + [False] * reply
                    longer.append((history + turn, trained + flags))
            open_ = longer
        return open_

    return Shape(f"{GROUPS} x {SEQUENCES} multi-turn trees, prompt {prompt}, 3 turns", draw)


SHAPES: dict[str, Shape] = {
    "a": answers(200, 16, 200),
    "b": answers(16, 16, 200),
    "c": answers(1000, 50, 50),
    "d": conversations(120, 20, 100, reply=40),
    # For accelerators: 14,592 unique tokens a group, so that micro-batches of 16,384 tokens are full.
    "throughput": answers(256, 1792, 1792, groups=8),
    # For tests: every shape of sequence, in a second.
    "tiny": answers(12, 3, 9),
    "tiny-tree": conversations(8, 2, 5, reply=3),
}


def make_case(name: str, *, vocabulary: int, score: Scorer, seed: int = 0) -> Case:
    """Draw the batch of a case.

    Args:
        name: A key of `SHAPES`.
        vocabulary: Token ids are drawn below it.
        score: The sampler's log-probs; normally the model that is trained.
        seed: Of lengths, tokens, scores and noise.
    """
    shape = SHAPES[name]
    generator = random.Random(f"{name} {seed}")

    def tokens(count: int) -> list[int]:
        return [generator.randrange(vocabulary) for _ in range(count)]

    groups = []
    for _ in range(shape.groups):
        sequences = shape.draw(generator, tokens)
        # Distinct, evenly spaced and shuffled: spread in every group, and no advantage of zero.
        scores = [index / (SEQUENCES - 1) for index in range(SEQUENCES)]
        generator.shuffle(scores)
        groups.append(
            {
                "tokens": [sequence for sequence, _ in sequences],
                "masks": [
                    [token if on else IGNORED for token, on in zip(*sequence, strict=True)]
                    for sequence in sequences
                ],
                "scores": scores,
                "inference_logprobs": [
                    _with_noise(sequence, trained, score, generator) for sequence, trained in sequences
                ],
                "generation_params": {"temperature": 1.0},
                "overrides": None,
                "group_overrides": None,
                "env_id": 0,
            }
        )
    return Case(name, shape.title, groups)


def _with_noise(
    tokens: list[int], trained: list[bool], score: Scorer, generator: random.Random
) -> list[float]:
    """The sampler's log-prob where trained, 1.0 elsewhere, as environments send it."""
    logprobs = [1.0, *score(tokens)]
    return [
        min(0.0, logprob + generator.uniform(-SAMPLER_NOISE, SAMPLER_NOISE)) if on else 1.0
        for logprob, on in zip(logprobs, trained, strict=True)
    ]

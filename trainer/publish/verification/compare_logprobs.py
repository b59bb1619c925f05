"""Judges whether a server serves the weights it was given. Numbers in, verdict out; no I/O.

Two questions are asked of the probes' log-probs, in nats:

1. **Close enough?** The mean absolute difference between the server's numbers and the trainer's own must
   not exceed a tolerance that follows from the precision the server computes in; nor be much larger than it
   usually is at this server, because rounding differs little from version to version and one broken tensor
   among hundreds adds to it less than a tolerance for all servers can tell.
2. **Did it move?** One small optimizer step moves log-probs by far less than that tolerance, so a server
   that quietly kept its old weights would pass the first question. The second one compares *movements*
   since an earlier version that was proven on the same server (the baseline). With `d` the trainer's
   movement and `m` the server's, the fraction of the update that arrived is

       fraction = <m, d> / <d, d>        about 1 for the new weights, 0 for the old ones

   Rounding that the server does the same way each time cancels in `m`. What does not cancel blurs the
   fraction by about `noise / |d|`, where `noise` is estimated from how far the server was from the trainer
   when the baseline was proven. The question is only answered where that blur is small; otherwise the two
   versions are not distinguishable at the server's precision, and the result says so. The baseline then
   stays, and the movement grows with every version until it is measurable: a server that never updates is
   found after a few publishes at the latest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain

import numpy as np
from numpy.typing import NDArray

TOLERANCES = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}
"""Largest mean absolute log-prob difference, in nats, that is still "the same weights", by the type that
the server computes in.

Measured with SmolLM2-135M-Instruct against float32 master weights, over versions that differ by a step:
float32 1.4e-5 (the embedded server), float16 0.005 to 0.008, bfloat16 0.04 to 0.12; larger models are
closer. The margins are for other kernels and hardware; a wrong model is off by whole nats."""

DEFAULT_DTYPE = "bfloat16"
"""Type that a server computes in when the checkpoint does not say."""

LEAST_NOISE = 1e-6
"""Nats. Even a server that agreed with the trainer on every digit once may round differently next time."""

NOISE_FACTOR = 5.0
"""From the distance at the baseline to the uncertainty of a movement. Two independent roundings give the
square root of 2; but roundings are heaviest on the very tokens that an update moves most, and a chain of
updates of a 135M model in float16 scattered the fraction three times as much as independence would."""

MAX_BLUR = 0.1
"""Largest uncertainty of the fraction at which the second question is answered."""

MIN_FRACTION = 0.5
"""An update counts as arrived from this fraction on: below it the server is closer to the old weights than
to the new ones. With `MAX_BLUR` both 0 and 1 are five times the blur away."""

USUAL_GROWTH = 1.75
"""Factor by which a server may be further off than usual. Over versions of one model the mean
difference varies by a tenth in bfloat16; one broken tensor of a 135M model raises it by half at the very
least, and as a rule to several times as much."""

LEAST_SHARE = 0.05
"""Of the tolerance. Below it "further off than usual" is not asked: there it may be chance."""

UNMOVED_ABOVE = 1e-4
"""Nats, root mean square. When the trainer moved by this much and not one bit of the server's numbers did,
the weights are the old ones, whatever the precision: in any precision some weights round differently."""

LARGEST_LOGPROB = 1e6
"""Nats, either way. No model gives more, and sums of larger numbers overflow."""

Scores = list[list[float]]
"""[probe][token]: log-probs of tokens 1..T-1 of each probe, in nats."""


@dataclass(frozen=True, kw_only=True)
class ProbeScores:
    """Holds the trainer's own log-probs of the probes."""

    texts: Scores
    next_tokens: tuple[Sequence[float], ...] = ()
    """For each beginning of the passage the log-probs of the whole vocabulary, in nats, in float32."""


class Verdict(StrEnum):
    """Names the outcome of a comparison."""

    MATCH = "match"
    OVER_TOLERANCE = "over tolerance"
    OVER_USUAL = "further off than usual"
    """Within the tolerance, but not within what this server's rounding explains."""
    STALE = "stale"
    STALE_CACHE = "stale prefix cache"
    """The weights are new, but what old ones computed is still used."""
    NOT_FINITE = "not finite"
    WRONG_COUNT = "wrong count"


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Keeps a version proven on a server: what the trainer expected and what the server said."""

    expected: Scores
    served: Scores


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Reports what a comparison found. Differences and movements are in nats, over all probe tokens."""

    verdict: Verdict
    tolerance: float
    """Largest mean difference accepted."""
    bound: float = math.nan
    """Largest mean difference accepted this time: the tolerance, or less if this server is usually closer."""
    tokens: int = 0
    """Log-probs compared."""
    mean_difference: float = math.nan
    """Mean of |served - expected|."""
    max_difference: float = math.nan
    """Largest |served - expected|."""
    expected_movement: float | None = None
    """Mean of |expected - baseline's expected|. None without a baseline."""
    served_movement: float | None = None
    """Mean of |served - baseline's served|. None without a baseline."""
    fraction: float | None = None
    """Share of the movement that arrived at the server. None where it is not measurable."""
    next_tokens: int = 0
    """Log-probs compared along the path that generation takes. 0: not asked."""
    next_mean_difference: float | None = None
    """Mean of |served - expected| there."""
    next_fraction: float | None = None
    """Share of the movement that arrived there. None where it is not measurable."""
    cached_tokens: int | None = None
    """Tokens of the passage that came from the prefix cache at the first request after the update, which
    must be 0. None: the server does not tell."""
    logprob_kind: str | None = None
    """Meaning of the server's log-probs at a temperature other than 1 (`LogprobKind`). None: not asked."""
    detail: str = ""
    """The fault of the numbers, in words."""

    @property
    def matches(self) -> bool:
        """Whether the server serves these weights, as far as the probes can tell."""
        return self.verdict is Verdict.MATCH

    @property
    def distinguishable(self) -> bool:
        """Whether the second question was answered: old weights would not have passed."""
        return self.fraction is not None

    def describe(self) -> str:
        """Say the verdict and its numbers in one line."""
        if self.detail and not self.tokens:
            return f"{self.verdict}: {self.detail}"
        text = (
            f"{self.verdict}: {self.tokens} log-probs differ by {self.mean_difference:.2g} nats on average "
            f"(accepted {self.bound:.2g}), {self.max_difference:.2g} at most"
        )
        if self.expected_movement is not None and self.served_movement is not None:
            text += (
                f"; the update moved the trainer's by {self.expected_movement:.2g} and the server's by "
                f"{self.served_movement:.2g}"
            )
            if self.fraction is None:
                text += ", too little to tell old from new at the server's precision"
            else:
                text += f": {self.fraction:.0%} of it arrived"
        if self.next_mean_difference is not None:
            text += f"; generated tokens differ by {self.next_mean_difference:.2g}"
        if self.next_fraction is not None:
            text += f", {self.next_fraction:.0%} of the update arrived there"
        return f"{text}. {self.detail}" if self.detail else text


def compare(
    served: Scores,
    expected: Scores,
    *,
    tolerance: float,
    baseline: Baseline | None = None,
    usual: float | None = None,
) -> Comparison:
    """Judge whether `served` comes from the weights that `expected` comes from.

    Args:
        served: The server's log-probs of the probes.
        expected: The trainer's own.
        tolerance: Largest mean absolute difference accepted, in nats.
        baseline: The same two for an earlier version, proven on the same server. None: only the first
            question is asked.
        usual: Mean absolute difference of this server at versions that were proven; None: not known yet.
    """
    if _lengths(served) != _lengths(expected):
        detail = f"log-probs per probe: the server gave {_lengths(served)}, expected {_lengths(expected)}"
        return Comparison(verdict=Verdict.WRONG_COUNT, tolerance=tolerance, detail=detail)
    now, want = _flat(served), _flat(expected)
    if not want.size:
        detail = "there is not a single probe token to compare"
        return Comparison(verdict=Verdict.WRONG_COUNT, tolerance=tolerance, detail=detail)
    for who, numbers in (("the server", now), ("the trainer", want)):
        if broken := sum(not is_logprob(number) for number in numbers.tolist()):
            detail = f"{broken} of {len(numbers)} log-probs of {who} are not finite, or none"
            return Comparison(verdict=Verdict.NOT_FINITE, tolerance=tolerance, detail=detail)
    differences = np.abs(now - want)
    mean = float(differences.mean())
    bound = tolerance if usual is None else bound_from(usual, tolerance)
    verdict = Verdict.MATCH
    if mean > bound:
        verdict = Verdict.OVER_TOLERANCE if mean > tolerance else Verdict.OVER_USUAL
    expected_movement = served_movement = fraction = None
    if baseline is not None and _lengths(baseline.expected) == _lengths(expected):
        want_before, now_before = _flat(baseline.expected), _flat(baseline.served)
        trainer_moved, server_moved = want - want_before, now - now_before
        expected_movement = float(np.abs(trainer_moved).mean())
        served_movement = float(np.abs(server_moved).mean())
        fraction = arrived(trainer_moved, server_moved, noise=_root_mean_square(now_before - want_before))
        if fraction is not None and fraction < MIN_FRACTION:
            verdict = Verdict.STALE
    return Comparison(
        verdict=verdict,
        tolerance=tolerance,
        bound=bound,
        tokens=len(differences),
        mean_difference=mean,
        max_difference=float(differences.max()),
        expected_movement=expected_movement,
        served_movement=served_movement,
        fraction=fraction,
    )


def bound_from(usual: float, tolerance: float) -> float:
    """Return the largest mean difference to accept of a server that is usually `usual` nats off."""
    return min(tolerance, max(USUAL_GROWTH * usual, LEAST_SHARE * tolerance))


def arrived(trainer: NDArray[np.float64], server: NDArray[np.float64], *, noise: float) -> float | None:
    """Return the fraction of the trainer's movement found at the server.

    Args:
        trainer: The trainer's movement, per token.
        server: The server's movement, per token.
        noise: Root mean square distance between server and trainer when they had equal weights.

    Returns:
        About 1 if the server has the new weights, about 0 if it has the old ones; None where the two
        cannot be told apart.
    """
    if not server.any() and _root_mean_square(trainer) >= UNMOVED_ABOVE:
        return 0.0
    square = float(trainer @ trainer)
    if square == 0.0 or NOISE_FACTOR * max(noise, LEAST_NOISE) / math.sqrt(square) > MAX_BLUR:
        return None
    return float(server @ trainer) / square


def is_logprob(number: float) -> bool:
    """Tell whether a number can be a log-prob at all; NaN cannot."""
    return abs(number) <= LARGEST_LOGPROB


def _lengths(scores: Scores) -> list[int]:
    return [len(row) for row in scores]


def _flat(scores: Scores) -> NDArray[np.float64]:
    return np.array(list(chain.from_iterable(scores)), dtype=np.float64)


def _root_mean_square(numbers: NDArray[np.float64]) -> float:
    return math.sqrt(float(numbers @ numbers) / len(numbers))

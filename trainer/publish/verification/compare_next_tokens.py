"""Judges what a server says while it generates: is its prefix cache fresh, are its log-probs raw or scaled?

Numbers in, verdict out; no I/O. Scoring a prompt goes around the prefix cache, so the texts alone would not
notice blocks of keys and values that old weights computed. Generation reads them: the next token's
log-probs after a long passage are compared with the trainer's own, for exactly those tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from trainer.publish.verification.compare_logprobs import Baseline, Comparison, Scores, Verdict, compare

LEAST_LOGPROB = -10.0
"""Nats. Tokens that the trainer finds less likely are not compared: a rare draw, on which servers of low
precision are off by whole nats."""

ASKED_TEMPERATURE = 0.5
"""Where raw and temperature-scaled log-probs differ by whole nats on the likeliest tokens."""

NextTokens = tuple[Mapping[int, float], ...]
"""For each beginning of the passage: token id to log-prob in nats, as a server gave them."""

Rows = tuple[Sequence[float], ...]
"""For each beginning of the passage the trainer's log-probs of the whole vocabulary."""


class LogprobKind(StrEnum):
    """Names what a server's log-probs are at a sampling temperature other than 1."""

    RAW = "raw"
    """Of the model's own distribution, whatever the temperature."""
    SCALED = "scaled"
    """Of the distribution that the token was drawn from: logits divided by the temperature."""
    NEITHER = "neither raw nor scaled"
    UNCLEAR = "not to be told"
    """The two hardly differ: the model is nearly certain of what comes next."""


@dataclass(frozen=True, kw_only=True)
class ProvenGeneration:
    """Keeps what was said of the next tokens when an earlier version was proven."""

    expected: Rows
    served: NextTokens


def compare_next_tokens(
    served: NextTokens, expected: Rows, *, tolerance: float, proven: ProvenGeneration | None = None
) -> Comparison:
    """Judge the next tokens' log-probs as `compare` judges the texts'.

    Movements are compared at the tokens that the server named both times.
    """
    tokens = [
        [token for token in said if row[token] > LEAST_LOGPROB]
        for said, row in zip(served, expected, strict=True)
    ]
    whole = compare(_pick(served, tokens), _pick(expected, tokens), tolerance=tolerance)
    if proven is None or not whole.tokens:
        return whole
    tokens = [
        [token for token in named if token in before]
        for named, before in zip(tokens, proven.served, strict=True)
    ]
    if not any(tokens):
        return whole
    baseline = Baseline(expected=_pick(proven.expected, tokens), served=_pick(proven.served, tokens))
    moved = compare(_pick(served, tokens), _pick(expected, tokens), tolerance=tolerance, baseline=baseline)
    verdict = moved.verdict if moved.verdict is Verdict.STALE else whole.verdict
    return replace(
        whole,
        verdict=verdict,
        expected_movement=moved.expected_movement,
        served_movement=moved.served_movement,
        fraction=moved.fraction,
    )


def logprob_kind(
    served: Mapping[int, float], row: Sequence[float], *, temperature: float, tolerance: float
) -> LogprobKind:
    """Tell raw from scaled log-probs of a token that was sampled at a temperature other than 1.

    Args:
        served: The server's log-probs.
        row: The trainer's, of the whole vocabulary, at temperature 1.
        temperature: Of the sampling.
        tolerance: Largest mean absolute difference accepted, in nats.
    """
    tokens = [token for token in served if row[token] > LEAST_LOGPROB]
    if not tokens:
        return LogprobKind.UNCLEAR
    raw = [row[token] for token in tokens]
    # Of logits z: log softmax(z / t) = log softmax(log softmax(z) / t).
    normalizer = _log_sum_exp([value / temperature for value in row])
    scaled = [value / temperature - normalizer for value in raw]
    distances = {
        kind: math.fsum(abs(served[token] - value) for token, value in zip(tokens, values, strict=True))
        / len(tokens)
        for kind, values in ((LogprobKind.RAW, raw), (LogprobKind.SCALED, scaled))
    }
    nearest, other = sorted(distances, key=distances.__getitem__)
    if not distances[nearest] <= tolerance:
        return LogprobKind.NEITHER
    ambiguous = distances[other] <= max(tolerance, 2 * distances[nearest])
    return LogprobKind.UNCLEAR if ambiguous else nearest


def _pick(rows: Sequence[Any], tokens: list[list[int]]) -> Scores:
    return [[row[token] for token in named] for row, named in zip(rows, tokens, strict=True)]


def _log_sum_exp(values: list[float]) -> float:
    highest = max(values)
    return highest + math.log(math.fsum(math.exp(value - highest) for value in values))

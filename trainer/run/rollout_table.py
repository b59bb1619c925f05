"""Sends a few rollouts to experiment trackers as a table: what the model wrote, and what it got for it."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from typing import Any, Final, Protocol

from trainer.samples.sample import Sample

logger = logging.getLogger(__name__)

EVERY: Final = 10
"""Steps between two tables; the first step has one too."""
TAKING_TABLES: Final = ("wandb", "trackio")
COLUMNS: Final = ("step", "environment", "group", "score", "advantage", "tokens", "prompt", "answer")

_NAME: Final = "rollouts"
_PROMPT_TOKENS: Final = 512  # its last ones
_ANSWER_TOKENS: Final = 2048
_CHARACTERS: Final = 8000


class TokenDecoder(Protocol):
    """What is used of a tokenizer."""

    def decode(self, token_ids: list[int]) -> Any:
        """Return the text of tokens."""


class RolloutTables:
    """Makes a table of a step now and then, and hands it to the trackers that take tables.

    Args:
        trackers: Accelerate's.
        tokenizer: Of the model.
        count: Sequences of a table; 0: no tables.
    """

    def __init__(self, trackers: Sequence[Any], tokenizer: TokenDecoder, *, count: int) -> None:
        self._trackers = [tracker for tracker in trackers if tracker.name in TAKING_TABLES]
        self._tokenizer = tokenizer
        self._count = count
        self._failed = False

    def send(self, samples: Sequence[Sample], *, step: int) -> None:
        """Send the table of a step if one is due. A tracker that fails costs the table, not the run."""
        if not self._trackers or not self._count or (step % EVERY and step != 1):
            return
        rows = [self._row(sample, step) for sample in best_and_worst(samples, self._count)]
        for tracker in self._trackers:
            try:
                if tracker.name == "wandb":
                    tracker.log_table(_NAME, columns=list(COLUMNS), data=rows, step=step)
                else:
                    tracker.log({_NAME: _trackio_table(rows)}, step=step)
            except Exception as error:  # noqa: BLE001 - whatever another package raises
                if not self._failed:
                    logger.warning("%s does not take the table of rollouts: %s", tracker.name, error)
                self._failed = True

    def _row(self, sample: Sample, step: int) -> list[Any]:
        trained = sample.loss_mask.nonzero()[:, 0]
        first = int(trained[0]) if len(trained) else len(sample.tokens)
        prompt = sample.tokens[max(0, first - _PROMPT_TOKENS) : first].tolist()
        answer = sample.tokens[first : first + _ANSWER_TOKENS].tolist()
        advantage = float(sample.advantages.sum()) / max(1, len(trained))
        return [
            step,
            sample.env_id,
            sample.group_index,
            sample.score,
            advantage,
            len(sample.tokens),
            str(self._tokenizer.decode(prompt))[-_CHARACTERS:],
            str(self._tokenizer.decode(answer))[:_CHARACTERS],
        ]


def _trackio_table(rows: list[list[Any]]) -> Any:
    """Trackio's own kind of table."""
    return importlib.import_module("trackio").Table(columns=list(COLUMNS), data=rows)


def best_and_worst(samples: Sequence[Sample], count: int) -> list[Sample]:
    """The sequences with the highest and the lowest scores, half of each, best first."""
    ranked = sorted(samples, key=lambda sample: -sample.score)
    if len(ranked) <= count:
        return ranked
    worst = count // 2
    return [*ranked[: count - worst], *(ranked[-worst:] if worst else [])]

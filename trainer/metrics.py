"""What each step did, as one row of numbers: in metrics.jsonl always, in experiment trackers by choice."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from atropos_client.private_files import PRIVATE_DIRECTORY, open_private, write_private
from trainer.errors import MetricsError
from trainer.preparation import PreparedBatch
from trainer.step import StepResult

logger = logging.getLogger(__name__)

Row = dict[str, Any]


class MetricsFile:
    """A JSON Lines file, one row a line, each on the disk before the next step begins.

    Args:
        path: Created if missing.
        resumed_step: Rows of later steps, which a resumed run computes again, are dropped.
        resumed_batch: Likewise rows of later batches, such as those that were skipped.
    """

    def __init__(self, path: Path, *, resumed_step: int, resumed_batch: int) -> None:
        self._path = path
        path.parent.mkdir(mode=PRIVATE_DIRECTORY, parents=True, exist_ok=True)
        if path.exists():
            self._drop_rows_after(resumed_step, resumed_batch)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row. Numbers that are not finite become null, which JSON can carry.

        Raises:
            MetricsError: It cannot be written.
        """
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        try:
            with open_private(self._path, "a") as file:
                file.write(json.dumps(finite) + "\n")
        except OSError as error:
            raise MetricsError(
                f"cannot write the metrics of step {row.get('step')} to {self._path}: {error}; make room and "
                "start again, the run goes on from its newest checkpoint"
            ) from error

    def _drop_rows_after(self, step: int, batch: int) -> None:
        kept, dropped = [], 0
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                later = row.get("step", 0) > step or row.get("batch", 0) > batch
            except (ValueError, AttributeError):
                later = True  # a line cut off when the process died
            dropped += later
            kept += [] if later else [line]
        if dropped:
            logger.warning(
                "%s: dropped %d rows after step %d, they are computed again", self._path, dropped, step
            )
            partial = self._path.with_suffix(".partial")
            write_private(partial, "".join(f"{line}\n" for line in kept).encode())
            partial.replace(self._path)


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Where the seconds of a step went, as the training thread saw them."""

    waiting: float
    """For the batch."""
    idle: float | None
    """From the end of the step before, its publish and its checkpoint, to the first computation of this one;
    None: there is none before."""
    preparing: float
    """Preparing and packing, parsing not counted; beside the step before, if `prepared_ahead`."""
    prepared_ahead: bool
    training: float
    """From when the batch was taken to its new weights."""
    publishing: float
    """Until training could go on; the rest goes on beside it."""


def batch_metrics(batch: PreparedBatch) -> Row:
    """Rewards, advantages and counts of a batch."""
    return {
        "reward_mean": fmean(batch.scores) if batch.scores else None,
        "reward_std": pstdev(batch.scores) if batch.scores else None,
        "advantage_mean": fmean(batch.advantages) if batch.advantages else None,
        "advantage_std": pstdev(batch.advantages) if batch.advantages else None,
        "advantage_min": min(batch.advantages, default=None),
        "advantage_max": max(batch.advantages, default=None),
        "groups": batch.groups,
        "sequences": len(batch.scores),
        "trained_tokens": round(batch.trained_tokens),
        "groups_without_spread": batch.groups_without_spread,
        "groups_with_binary_masks": batch.groups_with_binary_masks,
        "set_aside_groups": len(batch.set_aside),
    }


def step_metrics(result: StepResult) -> Row:
    """Loss, gradient, token counts and waste of a step."""
    saved = result.sequence_tokens - (result.computed_tokens - result.padding_tokens)
    return {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        **result.per_token,
        **(result.mismatch.metrics() if result.mismatch is not None else {}),
        "computed_tokens": result.computed_tokens,
        "sequence_tokens": result.sequence_tokens,
        "padding_share": result.padding_tokens / result.computed_tokens,
        "prefix_tokens_saved": saved,
        "prefix_tokens_saved_share": saved / result.sequence_tokens,
        "micro_batches": result.micro_batches,
        "imbalance": result.imbalance,
    }


def time_metrics(times: StepTimes, batch: PreparedBatch, result: StepResult) -> Row:
    """Where the time of a step went, and how fast it was."""
    return {
        "waiting_seconds": times.waiting,
        "idle_seconds": times.idle,
        "preparing_seconds": times.preparing,
        "prepared_ahead": times.prepared_ahead,
        "training_seconds": times.training,
        "publishing_seconds": times.publishing,
        "tokens_per_second": batch.trained_tokens / times.training,
        "total_tokens_per_second": result.sequence_tokens / times.training,
    }

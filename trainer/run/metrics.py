"""Writes one row of numbers a step: to metrics.jsonl always, to experiment trackers by choice."""

from __future__ import annotations

import json
import logging
import math
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from atropos_client.private_files import PRIVATE_DIRECTORY, open_private, write_private
from schemas import count_of
from trainer.config import TrainerConfig
from trainer.errors import ConfigurationError, MetricsError
from trainer.model.sharding import Spread
from trainer.packing import MicroBatch, imbalance
from trainer.row_files import drop_rows
from trainer.run.optimizer_step import StepResult
from trainer.run.rollout_table import RolloutTables
from trainer.run.train_state import PreparedRun
from trainer.samples.prepare import PreparedBatch

logger = logging.getLogger(__name__)

Row = dict[str, Any]


def batch_metrics(batch: PreparedBatch) -> Row:
    """Rewards, advantages and counts of a batch."""
    return {
        "reward_mean": fmean(batch.scores) if batch.scores else None,
        "reward_std": pstdev(batch.scores) if batch.scores else None,
        "advantage_mean": fmean(batch.advantages) if batch.advantages else None,
        "advantage_std": pstdev(batch.advantages) if batch.advantages else None,
        "advantage_min": min(batch.advantages, default=None),
        "advantage_max": max(batch.advantages, default=None),
        **({} if batch.kl_teacher is None else {"kl_teacher": batch.kl_teacher}),
        "groups": batch.groups,
        "sequences": len(batch.scores),
        "trained_tokens": round(batch.trained_tokens),
        "groups_without_spread": batch.groups_without_spread,
        "groups_with_binary_masks": batch.groups_with_binary_masks,
        "set_aside_groups": len(batch.set_aside),
    }


def packing_metrics(micro_batches: Sequence[MicroBatch], spread: Spread) -> Row:
    """Token counts and waste of a step.

    Args:
        micro_batches: All of the step, in the order of `pack`.
        spread: The processes that compute it.
    """
    computed = sum(each.computed_tokens for each in micro_batches)
    padding = sum(each.padding_tokens for each in micro_batches)
    in_sequences = sum(each.sequence_tokens for each in micro_batches)
    saved = in_sequences - (computed - padding)
    costs = [each.cost for each in micro_batches]
    return {
        "computed_tokens": computed,
        "sequence_tokens": in_sequences,
        "padding_share": padding / computed,
        "prefix_tokens_saved": saved,
        "prefix_tokens_saved_share": saved / in_sequences,
        "micro_batches": len(micro_batches),
        "imbalance": imbalance(costs, spread.teams, lock_step=spread.in_lock_step),
    }


def step_metrics(result: StepResult) -> Row:
    """Loss and gradient of a step."""
    return {
        "staleness": result.staleness,
        "learning_rate": result.learning_rate,
        "idle_seconds": result.idle,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        **result.per_token,
        **(result.mismatch.metrics() if result.mismatch is not None else {}),
    }


class RowWriter:
    """Writes the rows of a run: each is on the disk before the next step begins.

    Args:
        config: The run's configuration.
        prepared: Rows after its checkpoint, which a resumed run computes again, are dropped.
        on_row: Called with every row, e.g. to show progress.
    """

    def __init__(
        self, config: TrainerConfig, prepared: PreparedRun, *, on_row: Callable[[Row], None] | None
    ) -> None:
        self._config = config
        self._accelerator = prepared.accelerator
        self._on_row = on_row
        self._tokenizer = prepared.policy.tokenizer
        self._tables: RolloutTables | None = None
        state = prepared.state
        self._is_new = prepared.checkpoint is None
        self._first_step = state.step
        self._path = config.train.output_dir / "metrics.jsonl"
        self._path.parent.mkdir(mode=PRIVATE_DIRECTORY, parents=True, exist_ok=True)
        drop_later_rows(self._path, step=state.step, batch=state.batches)

    def start_trackers(self) -> None:
        """Open the configured experiment trackers with the settings of the run; a resumed run goes on there.

        Raises:
            ConfigurationError: One cannot be opened.
        """
        settings = self._config.logging
        if not settings.trackers:
            return
        # Trackers take plain values only; secrets are masked by the dump.
        dump = self._config.model_dump(mode="json")
        flat = {f"{name}.{key}": str(value) for name, part in dump.items() for key, value in part.items()}
        try:
            self._accelerator.init_trackers(settings.project, init_kwargs=self._tracker_options())
            for tracker in self._accelerator.trackers:
                # TensorBoard makes a further run of each configuration.
                if self._is_new or tracker.name != "tensorboard":
                    tracker.store_init_configuration(flat)
            self._tables = RolloutTables(self._accelerator.trackers, self._tokenizer, count=settings.rollouts)
        except Exception as error:
            raise ConfigurationError(
                f"logging.trackers ({', '.join(settings.trackers)}) cannot be opened: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _tracker_options(self) -> dict[str, dict[str, Any]]:
        """Options with which each tracker goes on with the same run, from the step after the checkpoint's."""
        run = _tracker_run(self._config.train.output_dir, new=self._is_new)
        group = {"group": self._config.logging.group} if self._config.logging.group else {}
        return {
            "tensorboard": {"purge_step": self._first_step + 1},
            "wandb": {"id": run, "resume": "allow", **group},
            "trackio": {"name": run, "resume": "allow"},
        }

    def write(self, row: Row, *, step: int) -> None:
        """Write a row.

        Args:
            row: The row; it may tell of an earlier step, whose publish has only now ended, say.
            step: The current step: what trackers sort by, and some take no step before the newest.

        Raises:
            MetricsError: It cannot be written.
        """
        append_row(self._path, row)
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        self._accelerator.log(numbers, step=step)
        if self._on_row is not None:
            self._on_row(row)

    def write_rollouts(self, batch: PreparedBatch, *, step: int) -> None:
        """Hand a few sequences of a step that was trained to the trackers that take tables."""
        if self._tables is not None:
            self._tables.send(batch.samples, step=step)


def drop_later_rows(path: Path, *, step: int, batch: int) -> None:
    """Drop the rows of later steps, or of later batches (such as those that were skipped)."""
    dropped = drop_rows(path, lambda row: row.get("step", 0) > step or row.get("batch", 0) > batch)
    if dropped:
        logger.warning(
            "%s: dropped %s after step %d, to be computed again", path, count_of(dropped, "row"), step
        )


def append_row(path: Path, row: Row) -> None:
    """Append a row to a file. Numbers that are not finite become null, which JSON can carry.

    Raises:
        MetricsError: It cannot be written.
    """
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    try:
        with open_private(path, "a") as file:
            file.write(json.dumps(finite) + "\n")
    except OSError as error:
        raise MetricsError(
            f"cannot write the metrics of step {row.get('step')} to {path}: {error.strerror or error}; when "
            "that is mended, start again: the run goes on from its newest checkpoint"
        ) from error


def _tracker_run(output: Path, *, new: bool) -> str:
    """Find the name under which trackers know the run in this directory."""
    file = output / "tracker_run"
    known = file.read_text(encoding="ascii", errors="replace").strip() if file.is_file() else ""
    if new or not re.fullmatch(r"[0-9a-f]{8,64}", known):
        known = secrets.token_hex(8)
        write_private(file, known.encode())
    return known

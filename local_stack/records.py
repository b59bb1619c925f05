"""Reads the steps, evaluations and checkpoints of a run from its directory while it goes on.

The trainer writes, this module only reads: whatever it shows can also be read by anyone else.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"step-(\d+)")


class StepRow(BaseModel):
    """One optimizer step as the trainer wrote it into `metrics.jsonl`; keys not shown here are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    step: int
    """Number of the step, from 1."""
    loss: float | None = None
    reward_mean: float | None = None
    """Mean score of the step's sequences."""
    tokens_per_second: float | None = None
    """Trained tokens over the seconds of training."""


class PublishRow(BaseModel):
    """One publish as the trainer wrote it into `metrics.jsonl`; keys not shown here are ignored.

    Publishing goes on beside the next step, so it has rows of its own. A version has several where it was
    published again, for instance to a server that was restarted.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    version: int
    """Version of the weights; version 0 is what training began with."""
    publish_seconds: float
    """Seconds from taking the weights out of the model to the last proof."""
    publish_pause_seconds: float
    """Seconds that generation stood still."""
    publish_verified: bool
    """Whether the servers were proven to serve these weights."""


class RunRecords:
    """Follows what a run writes into its directory: steps, publishes, the held-out score before training.

    A line of `metrics.jsonl` counts once it is complete. A trainer that goes on from a checkpoint replaces
    the file by one without the later steps; reading then starts over.
    """

    def __init__(self, run_dir: Path) -> None:
        self.heldout_before: float | None = None
        """Held-out accuracy of the untrained model; None until it was measured."""
        self._run_dir = run_dir
        self._file_id: int | None = None
        self._offset = 0
        self._steps: dict[int, StepRow] = {}
        self._publishes: dict[int, PublishRow] = {}

    @property
    def steps(self) -> list[StepRow]:
        """All steps so far, in order."""
        return [self._steps[step] for step in sorted(self._steps)]

    @property
    def publishes(self) -> list[PublishRow]:
        """The last publish of each version made by training, in order of versions."""
        return [self._publishes[version] for version in sorted(self._publishes)]

    def read_new(self) -> bool:
        """Read what was written since the last call; returns whether there are new steps."""
        if self.heldout_before is None:
            self.heldout_before = read_accuracy(before_training(self._run_dir))
        rows = [_parse(line) for line in self._new_lines()]
        self._steps.update({row.step: row for row in rows if isinstance(row, StepRow)})
        self._publishes.update(
            {row.version: row for row in rows if isinstance(row, PublishRow) and row.version}
        )
        return any(isinstance(row, StepRow) for row in rows)

    def _new_lines(self) -> list[bytes]:
        try:
            with (self._run_dir / "metrics.jsonl").open("rb") as file:
                file_id = os.fstat(file.fileno()).st_ino
                if file_id != self._file_id:
                    self._file_id, self._offset, self._steps, self._publishes = file_id, 0, {}, {}
                file.seek(self._offset)
                appended = file.read()
        except FileNotFoundError:
            return []
        complete = appended[: appended.rfind(b"\n") + 1]
        self._offset += len(complete)
        return complete.splitlines()


def _parse(line: bytes) -> StepRow | PublishRow | None:
    """Read one line; None for a row of another kind, or one that cannot be read."""
    kinds: dict[str, type[StepRow] | type[PublishRow]] = {"step": StepRow, "publish": PublishRow}
    try:
        fields = json.loads(line)
        kind = kinds.get(fields.get("kind"))
        return None if kind is None else kind.model_validate(fields)
    except (ValueError, AttributeError, ValidationError) as error:
        logger.warning("a line of metrics.jsonl cannot be read (%s): %r", error, line[:200])
        return None


def before_training(run_dir: Path) -> Path:
    """Return where the held-out score of the untrained model is written."""
    return run_dir / "evaluations" / "before"


def read_accuracy(directory: Path) -> float | None:
    """Return the held-out accuracy that an evaluation wrote into `directory`; None if it has not finished."""
    try:
        written = json.loads((directory / "metrics.json").read_text(encoding="utf-8"))
        return float(written["results"]["all"]["accuracy"])
    except (FileNotFoundError, ValueError, KeyError):
        return None  # not there yet, or not yet written to its end


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the checkpoint with the highest step in `run_dir`; None if there is none."""
    found = [
        (int(match.group(1)), path)
        for path in (run_dir / "checkpoints").glob("step-*")
        if path.is_dir() and (match := _CHECKPOINT.fullmatch(path.name))
    ]
    return max(found)[1] if found else None

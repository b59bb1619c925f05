"""Records the trainer's own log-probs of a few groups of each step, for those who look at the run.

They are those that the loss was computed from, before the weights changed, so that the page of the run can
say token by token where sampler and trainer disagree. Of several processes process 0 records what it computed
itself.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from atropos_client.private_files import open_private
from trainer.packing import MicroBatch
from trainer.row_files import LOGPROBS_FILE

logger = logging.getLogger(__name__)

LARGEST_FILE: Final = 64 << 20
"""Bytes after which a file becomes the older of two; that of before is dropped."""


class LogprobLog:
    """Collects log-probs of a step while it is computed, and writes them when it is done.

    Args:
        directory: The run's output directory.
        groups: How many groups of each step; 0: none.
    """

    def __init__(self, directory: Path, *, groups: int) -> None:
        self._path = directory / LOGPROBS_FILE
        self._groups = groups
        self._failed = False
        self._wanted: list[tuple[list[tuple[int, int]], list[Tensor]]] = []
        self._logprobs: list[list[Tensor]] = []

    def begin(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Choose the first groups of a step that these micro-batches, on the CPU, hold."""
        self._wanted, self._logprobs = [], []
        chosen: set[int] = set()
        for batch in micro_batches if self._groups else ():
            sequences, places = [], []
            for sequence, (group, index) in enumerate(batch.origins.tolist()):
                if group in chosen or len(chosen) < self._groups:
                    where = (batch.sequence_ids == sequence) & (batch.loss_mask != 0)
                    if where.any():
                        chosen.add(group)
                        sequences.append((group, index))
                        places.append(where.nonzero()[:, 0])
            self._wanted.append((sequences, places))

    def add(self, micro_batch: int, logprobs: Tensor) -> None:
        """Keep those of the chosen groups, on the device: nothing waits for it.

        Args:
            micro_batch: Its position among those that `begin` was given.
            logprobs: Of its trained tokens, [N].
        """
        if micro_batch < len(self._wanted):
            _, places = self._wanted[micro_batch]
            self._logprobs.append([logprobs[each.to(logprobs.device)] for each in places])

    def write(self, *, step: int, batch: int, set_aside: Collection[int]) -> None:
        """Write what was collected of a step. A disk that fails costs the record, not the run.

        Args:
            step: The step.
            batch: Number of its batch.
            set_aside: Places in the batch of the groups that were not trained on.
        """
        lines = []
        for (sequences, _), values in zip(self._wanted, self._logprobs, strict=False):
            for (group, index), logprobs in zip(sequences, values, strict=True):
                rounded = [round(value, 5) for value in logprobs.to(torch.float32).tolist()]
                row = {"batch": batch, "step": step, "group": _place(group, set_aside), "sequence": index}
                lines.append(json.dumps({**row, "logprobs": rounded}) + "\n")
        self._wanted, self._logprobs = [], []
        if not lines:
            return
        try:
            with open_private(self._path, "a") as file:
                file.write("".join(lines))
                size = file.tell()
            if size > LARGEST_FILE:
                self._path.replace(self._path.with_suffix(".older.jsonl"))
        except OSError as error:
            if not self._failed:
                logger.warning("%s cannot be written (%s): the run goes on without it", self._path, error)
            self._failed = True


def _place(group: int, set_aside: Collection[int]) -> int:
    """The place in the batch of the group at this position among those that were not set aside."""
    place = -1
    for _ in range(group + 1):
        place += 1
        while place in set_aside:
            place += 1
    return place

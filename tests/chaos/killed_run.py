"""A run that kills itself: leaves everything that a run writes, some of it only in a write-ahead log.

`python -m tests.chaos.killed_run DIRECTORY WORD ...` with the words of `atropos-train run`. There is no API:
all batches are in the journal, the last two recorded while the run went on.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

import torch

from atropos_client.journal import Journal
from tests.trainer.batches import make_bodies, make_group
from trainer.config import load_config
from trainer.run.build import build_trainer
from trainer.run.metrics import Row
from trainer.sources.live import AtroposSource

BATCHES = 9
"""Batches in the journal that can be trained on."""
KILLED_AFTER = 5
"""Steps; there is a checkpoint of every second one."""


def main(output: Path, words: list[str]) -> None:
    """Record, train, die."""
    torch.set_num_threads(1)
    generator = random.Random(0)
    good = make_bodies(BATCHES - 1, first_seed=10)
    bad = make_group(generator)
    bad["scores"] = bad["scores"][:1]
    mixed = json.dumps({"batch": [bad, make_group(generator)]}).encode()
    with Journal.open(output / "journal") as journal:
        for body in (good[0], b"no batch", mixed, *good[1:-2]):
            journal.append(body, served_version=0)

    def on_row(row: Row) -> None:
        if row["step"] == KILLED_AFTER - 2 and row["kind"] == "step":
            for body in good[-2:]:
                ledger.append(body, 0)
        if row["step"] == KILLED_AFTER:
            fetcher = source._started().pid
            assert fetcher is not None
            os.kill(fetcher, signal.SIGKILL)  # it would close the journal in order
            os.kill(os.getpid(), signal.SIGKILL)

    trainer = build_trainer(load_config(None, words), on_row=on_row)
    ledger, source = trainer._ledger, trainer._source
    assert isinstance(ledger, Journal)
    assert isinstance(source, AtroposSource)
    trainer.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

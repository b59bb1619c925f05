"""`atropos-train run` in a process of its own that may die at a chosen moment; see `tests.chaos.deaths`.

Forked from a process that has loaded the libraries, so that a life begins in a moment.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from tests.chaos.deaths import Death
from trainer.cli import main


def run(words: list[str], log: Path, death: Death | None) -> None:
    """Run the command; what it prints is appended to `log`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    if death is not None:
        death.arm()
    sys.exit(main(["run", *words]))

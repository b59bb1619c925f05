"""A short run in a process of its own; several make a data-parallel run under torch.distributed.run."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.trainer.batches import make_bodies
from tests.trainer.runs import run

if __name__ == "__main__":
    model, output, first, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    run(model, output, make_bodies(steps)[first:], *sys.argv[5:], steps=steps)

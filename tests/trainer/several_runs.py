"""Short runs one after the other in one process; several such processes share each of them.

Starting processes costs more than a short run does. Each run finds the others anew, at a port of its own.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState
from torch import distributed

from tests.trainer.batches import make_bodies
from tests.trainer.runs import run
from trainer.errors import TrainerError
from trainer.model import sharding


def run_one(
    model: str,
    output: str,
    options: list[str],
    *,
    steps: int,
    resumed_from: str | None = None,
    first: int = 0,
    rank_1_writes_at_most: int | None = None,
) -> None:
    """Train, from a checkpoint of `first` steps or from the beginning; a refusal goes beside the output."""
    rank = int(os.environ["RANK"])
    if resumed_from is not None and rank == 0:
        shutil.copytree(resumed_from, Path(output) / "checkpoints" / Path(resumed_from).name)
    if rank_1_writes_at_most is not None and rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (rank_1_writes_at_most, resource.RLIM_INFINITY))
    try:
        run(Path(model), Path(output), make_bodies(steps)[first:], *options, steps=steps)
    except TrainerError as error:
        Path(f"{output}.refused-{rank}").write_text(f"{type(error).__name__}: {error}")


def main(runs: list[dict[str, Any]]) -> None:
    for each in runs:
        os.environ["MASTER_PORT"] = str(each.pop("port"))
        run_one(**each)
        if distributed.is_initialized():
            distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


if __name__ == "__main__":
    sharding.GATHERED_BYTES = 1 << 12  # type: ignore[misc] # so that the larger ones come in several pieces
    main(json.loads(Path(sys.argv[1]).read_text()))

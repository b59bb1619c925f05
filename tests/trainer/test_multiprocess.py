"""Two processes give what one gives: process 0 fetches, all train, gradients are summed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainer.batches import make_bodies
from tests.trainer.runs import rows, run, weights


def run_in_two_processes(model: Path, output: Path, *options: str, port: int, steps: int) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
        *("--master_addr", "127.0.0.1", "--master_port", str(port)),
        *("-m", "tests.trainer.multiprocess_run", str(model), str(output), str(steps), *options),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        # Many small micro-batches, an odd number of them: one process gets one that weighs nothing.
        ("--data.tokens_per_micro_batch", "40"),
        # One micro-batch for two processes.
        ("--loss.reduction", "sequence"),
    ],
)
def test_two_processes_train_as_one(
    options: tuple[str, ...], tiny_model_directory: Path, tmp_path: Path, free_port: int
) -> None:
    run(tiny_model_directory, tmp_path / "one", make_bodies(2), *options, steps=2)
    run_in_two_processes(tiny_model_directory, tmp_path / "two", *options, port=free_port, steps=2)
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(two) == 2
    for ours, theirs in zip(two, one, strict=True):
        assert ours["trained_tokens"] == theirs["trained_tokens"]
        for name in ("loss", "grad_norm", "entropy", "ratio"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    expected = weights(tmp_path / "one/final")
    for name, tensor in weights(tmp_path / "two/final").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-4)

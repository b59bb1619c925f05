"""Several processes give what one gives, and resume; process 0 fetches, all train, gradients are summed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.forked import forked_ranks
from tests.trainer.batches import make_bodies
from tests.trainer.runs import assert_equal_tensors, rows, run, weights

LAUNCHERS = {
    "torchrun": "torch.distributed.run --nproc_per_node {count} --master_addr 127.0.0.1 --master_port {port}",
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes {count} --main_process_port {port}",
}


def run_in_processes(
    count: int,
    model: Path,
    output: Path,
    *options: str,
    port: int,
    steps: int,
    first: int = 0,
    launcher: str = "",
) -> None:
    """Train `steps` steps, of which the first `first` are done."""
    module, words = "tests.trainer.multiprocess_run", [str(model), str(output), str(first), str(steps)]
    if launcher:
        started = [word.format(count=count, port=port) for word in LAUNCHERS[launcher].split()]
        command = [sys.executable, "-m", *started, "-m", module, *words, *options]
        subprocess.run(command, timeout=200, check=True)
        return
    log = output.with_suffix(".log")
    ranks = forked_ranks(count, port, module, [*words, *options], stdout=log, stderr=log)
    try:
        assert [rank.wait(200) for rank in ranks] == [0] * count, log.read_text()[-3000:]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        # Many small micro-batches, an odd number of them: one process gets one that weighs nothing; and an
        # objective that takes statistics of the whole step.
        (
            *("--data.tokens_per_micro_batch", "40"),
            *("--loss.name", "kl_cov", "--loss.covariance_share", "0.2"),
            *("--data.advantage_estimator", "reinforce_plus_plus_baseline"),
        ),
        # One micro-batch for two processes.
        ("--loss.reduction", "sequence"),
        # What looks at the whole step before it begins.
        (
            *("--data.tokens_per_micro_batch", "40", "--loss.top_entropy_share", "0.4"),
            *("--loss.name", "ppo_clip", "--loss.reference", "base", "--loss.kl_coefficient", "0.1"),
            *("--loss.entropy_target", "9"),
        ),
    ],
)
def test_two_processes_train_as_one(
    options: tuple[str, ...], tiny_model_directory: Path, tmp_path: Path, free_port: int
) -> None:
    run(tiny_model_directory, tmp_path / "one", make_bodies(2), *options, steps=2)
    launcher = "accelerate" if "--loss.reduction" in options else ""  # the other one: tests.test_deploy
    run_in_processes(
        2, tiny_model_directory, tmp_path / "two", *options, port=free_port, steps=2, launcher=launcher
    )
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(two) == 2
    for ours, theirs in zip(two, one, strict=True):
        assert ours["trained_tokens"] == theirs["trained_tokens"]
        for name in ("loss", "grad_norm", "entropy", "ratio"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    expected = weights(tmp_path / "one/final")
    for name, tensor in weights(tmp_path / "two/final").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_resume_to_the_bits_of_an_uninterrupted_run(
    count: int, tiny_model_directory: Path, tmp_path: Path, free_port: int
) -> None:
    """With dropout, so that the random numbers of every process count."""
    lora = ("--model.lora.rank", "4", "--model.lora.dropout", "0.3", "--data.tokens_per_micro_batch", "40")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run_in_processes(count, tiny_model_directory, whole, *lora, port=free_port, steps=4)
    shutil.copytree(whole / "checkpoints/step-000002", halves / "checkpoints/step-000002")
    run_in_processes(count, tiny_model_directory, halves, *lora, port=free_port, steps=4, first=2)
    assert [row["loss"] for row in rows(halves)] == [row["loss"] for row in rows(whole)][2:]
    newest = "checkpoints/step-000004"
    for name in ("adapter/adapter_model.safetensors", "optimizer.safetensors"):
        assert_equal_tensors(load_file(halves / newest / name), load_file(whole / newest / name))

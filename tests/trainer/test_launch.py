"""What launchers set: several processes are one run or refused, and Accelerate's settings change nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import Forked, run_module
from tests.trainer.batches import make_bodies
from tests.trainer.runs import assert_equal_tensors, run, weights
from trainer.errors import ConfigurationError
from trainer.launch import refuse_separate_runs, require_whole_launch


@pytest.mark.slow
def test_accelerate_that_starts_one_process_instead_of_two_is_refused(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["-m", "trainer.cli", "run", "--model.path", str(tiny_model_directory)]
    command += ["--train.output_dir", str(tmp_path / "run")]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "MASTER_ADDR")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert "`accelerate launch` was asked for several processes" in done.stderr
    assert "torchrun --nnodes NODES --nproc_per_node PROCESSES -m trainer.cli run" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_that_do_not_share_their_directory_are_refused(
    tiny_model_directory: Path, tmp_path: Path, free_port: int
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--no_python"]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(free_port)]
    words = f"-m trainer.cli run --train.device cpu --model.path {tiny_model_directory}"
    command += ["sh", "-c", f"{sys.executable} {words} --train.output_dir {tmp_path}/node-$RANK"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    said = " ".join(done.stderr.split())
    # From whichever ends first: the launcher then ends the other, perhaps before it could say it.
    assert re.search(rf"train.output_dir {tmp_path}/node-[01] is not one directory for all processes", said)
    assert "several nodes need a file system that they share" in said
    assert not (tmp_path / "node-1").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("OPTIMIZER__LEARNING_RATE", "0.1", "optimizer.learning_rate is 0.1, there 1e-06"),
        ("PARALLEL__MODE", "sharded", "parallel.mode is sharded, there replicated"),
        ("LOSS__NAME", "ppo_clip", "loss.name is ppo_clip, there weighted_sft"),
    ],
)
def test_processes_with_different_settings_are_refused(
    tiny_model_directory: Path, tmp_path: Path, free_port: int, name: str, value: str, found: str
) -> None:
    words = ["run", "--train.device", "cpu", "--model.path", tiny_model_directory]
    words += ["--train.output_dir", tmp_path / "run"]
    logs = [tmp_path / "rank-0.log", tmp_path / "rank-1.log"]
    ranks = []
    for rank, log in enumerate(logs):
        variables = {"ATROPOS_TRAINER_" + name: value} if rank else {}
        variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "COLUMNS": "200"}
        ranks.append(Forked("trainer.cli", words, stdout=log, environment=os.environ | variables))
    try:
        assert [rank.wait(120) for rank in ranks] == [1, 2]
    finally:
        for each in ranks:
            each.kill()
    said = " ".join(logs[1].read_text().split())
    assert "process 1 has other settings than process 0: " in said
    assert found in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"RANK": "abc"}, "RANK=abc is no number"),
        ({"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS=x is no number"),
        ({"RANK": "1"}, "this is process 1 .RANK., but WORLD_SIZE does not say of how many"),
        ({"RANK": "1", "WORLD_SIZE": "1", "MASTER_ADDR": "a"}, "this is process 1 .* of 1 .WORLD_SIZE."),
        ({"WORLD_SIZE": "2"}, "2 processes were started .WORLD_SIZE., but MASTER_ADDR"),
        # All on one machine: nobody tells torch, though it might be guessed.
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            "2 processes .*, but MASTER_ADDR",
        ),
    ],
)
def test_half_of_what_a_launcher_sets_is_refused_before_others_are_looked_for(
    tmp_path: Path, tiny_model_directory: Path, environment: dict[str, str], found: str
) -> None:
    words = ["run", "--train.device", "cpu", "--model.path", tiny_model_directory]
    words += ["--train.output_dir", tmp_path / "run"]
    done = run_module("trainer.cli", *words, environment=os.environ | environment | {"COLUMNS": "200"})
    assert done.returncode == 2, done.stderr
    assert re.search(found, " ".join(done.stderr.split())), done.stderr
    assert "torchrun --nnodes NODES" in done.stderr


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0"},
        {"WORLD_SIZE": "1"},
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node-a"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "MASTER_ADDR": "node-a"},
    ],
)
def test_what_launchers_set_as_a_whole_is_taken(environment: dict[str, str]) -> None:
    require_whole_launch(environment)


@pytest.mark.parametrize(
    ("processes", "environment", "found"),
    [
        # srun without a launcher: every task is a run of its own.
        (1, {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}, "srun started 4 tasks"),
        # torchrun on each of two nodes, neither knowing of the other.
        (
            4,
            {"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "1"},
            "srun started 2 tasks",
        ),
        # An operator that sets ranks, but no LOCAL_RANK, without which Accelerate looks for nobody.
        (1, {"WORLD_SIZE": "2", "RANK": "1"}, "2 processes were started"),
        (1, {"OMPI_COMM_WORLD_SIZE": "3"}, "3 processes were started"),
        (2, {"WORLD_SIZE": "4"}, "4 processes were started .WORLD_SIZE., but 2 train together"),
    ],
)
def test_processes_that_would_be_runs_of_their_own_are_refused(
    processes: int, environment: dict[str, str], found: str
) -> None:
    with pytest.raises(ConfigurationError, match=found):
        refuse_separate_runs(processes, alone=False, environment=environment)


@pytest.mark.parametrize(
    ("processes", "environment"),
    [
        (1, {}),
        (1, {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}),  # in a batch script, not started by srun
        (1, {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "localhost"}),
        (8, {"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"}),
        (4, {"SLURM_STEP_NUM_TASKS": "4", "WORLD_SIZE": "4"}),
    ],
)
def test_processes_that_train_together_are_not(processes: int, environment: dict[str, str]) -> None:
    refuse_separate_runs(processes, alone=False, environment=environment)


def test_variables_of_accelerate_change_nothing_that_is_computed(
    tiny_model_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run(tiny_model_directory, tmp_path / "plain", make_bodies(2), steps=2)
    for name, value in {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "ACCELERATE_FP8_BACKEND": "TE",
        "ACCELERATE_SOMETHING_NEW": "on",
    }.items():
        monkeypatch.setenv(name, value)
    run(tiny_model_directory, tmp_path / "set", make_bodies(2), steps=2)
    assert_equal_tensors(weights(tmp_path / "set/final"), weights(tmp_path / "plain/final"))
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=8 has no effect" in caplog.text
    assert "ACCELERATE_SOMETHING_NEW" not in os.environ


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_other_ways_to_spread_a_model_are_refused_before_anything_is_made(
    name: str, tiny_model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ConfigurationError, match=f"ACCELERATE_USE_{name}=true.*torchrun"):
        run(tiny_model_directory, tmp_path / "run", make_bodies(1), steps=1)
    assert not (tmp_path / "run").exists()

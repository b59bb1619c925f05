"""Whole runs of verl's V1 trainer on Atropos batches, with two Ray workers, killed and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.runs import rows
from tests.verl.engines import config_for, options
from tests.verl.numbers import FLOAT32
from tests.verl.running import Stack, VerlRun, ledger, trained_bodies, wait
from trainer import RecordedSource
from trainer.run.build import build_trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("nobody_else_is_reached"),
]


def assert_trained_like_ours(
    model: Path, output: Path, directory: Path, steps: list[dict[str, Any]], settings: list[str]
) -> None:
    """Our trainer, given the batches in the order of the ledger, makes the same steps and weights."""
    config = config_for(model, directory, *options(settings), "--train.steps", str(len(steps)))
    build_trainer(config, source=RecordedSource(trained_bodies(output))).run()
    ours = rows(directory)
    assert [step["actor/loss"] for step in steps] == pytest.approx([row["loss"] for row in ours], abs=1e-6)
    norms = [row["grad_norm"] for row in ours]
    assert [step["actor/grad_norm"] for step in steps] == pytest.approx(norms, rel=1e-5)
    final = load_file(directory / "final" / "model.safetensors")
    published = load_file(output / "published" / f"v{len(steps):06d}" / "model.safetensors")
    assert published.keys() == final.keys()
    for name, tensor in final.items():
        assert torch.allclose(tensor, published[name], atol=1e-4, rtol=0), name
    assert all(step["publish/verified"] == 1 for step in steps)
    assert steps[-1]["publish/distinguishable"] == 1  # from the version before


def test_a_run_trains_like_ours_and_proves_each_publish(tiny_model_directory: Path, tmp_path: Path) -> None:
    settings = {"name": "ppo_clip", "reduction": "sequence"}
    with Stack(tiny_model_directory, tmp_path) as stack:
        run = VerlRun(stack, tmp_path / "run", steps=3, loss=settings)
        run.finish()
    assert [entry.step for entry in ledger(run.output) if entry.outcome == "trained"] == [1, 2, 3]
    same = [f"{name}={value}" for name, value in settings.items()]
    assert_trained_like_ours(tiny_model_directory, run.output, tmp_path / "ours", run.steps(), same)
    ours, theirs = rows(tmp_path / "ours")[-1], run.steps()[-1]
    for name in ("negative_logprob", "mismatch_kl", "clipped"):  # averages over the tokens of both ranks
        assert theirs[f"actor/{name}"] == pytest.approx(ours[name], rel=1e-4, abs=1e-6), name


def test_no_batch_is_lost_or_trained_twice_where_the_driver_is_killed(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    """With verl's own objective: its loss, its KL to its own reference, its entropy bonus."""
    actor, reference = "actor_rollout_ref.actor", "actor_rollout_ref.ref"
    words = [f"{actor}.use_kl_loss=true", f"{actor}.kl_loss_coef=0.1", f"{actor}.entropy_coeff=0.01"]
    words += [f"{reference}.fsdp_config.mixed_precision.{name}={kind}" for name, kind in FLOAT32.items()]
    settings = {"words": words, "objective": "verl"}
    with Stack(tiny_model_directory, tmp_path) as stack:
        killed = VerlRun(stack, tmp_path / "run", steps=4, **settings)
        # The checkpoint of step 2 is there, and batch 3 was trained on, which no checkpoint counts.
        wait(lambda: len(killed.steps()) >= 3, "train on three batches", killed.process)
        killed.process.kill()  # SIGKILL
        before = killed.steps()
        resumed = VerlRun(stack, tmp_path / "run", steps=4, **settings)
        resumed.finish()
    again = resumed.steps()
    assert [step["training/global_step"] for step in again] == [3, 4]
    assert again[0]["actor/loss"] == pytest.approx(before[2]["actor/loss"], abs=1e-6)  # the same batch
    trained = [entry for entry in ledger(resumed.output) if entry.outcome == "trained"]
    assert [entry.step for entry in trained] == [1, 2, 3, 4]
    assert [entry.number for entry in trained] == [1, 2, 3, 4]
    same = ["name=ppo_clip", "reduction=token", "dual_clip=3", "reference=base", "kl_estimator=k3"]
    same += ["kl_coefficient=0.1", "entropy_coefficient=0.01"]
    steps = [*before[:2], *again]
    assert_trained_like_ours(tiny_model_directory, resumed.output, tmp_path / "ours", steps, same)

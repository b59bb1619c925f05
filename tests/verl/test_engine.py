"""Steps of verl's engine on our rows with our losses are the steps of our own trainer."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
from verl.workers.config import FSDPActorConfig
from verl.workers.config.actor import PolicyLossConfig
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import ppo_loss

from atropos_client import parse_batch
from tests.verl.engines import assert_equal_steps, config_for, make_worker, options, our_step, verl_step
from tests.verl.traps import trap_body
from trainer.config import TrainerConfig
from trainer.samples.advantages import AdvantageNormalizer
from trainer.samples.prepare import PreparedBatch, prepare_batch
from trainer.samples.validation import ModelLimits
from verl_integration.batches import make_step
from verl_integration.losses import POLICY_LOSSES, engine_loss

LOSSES = ("weighted_sft", "ppo_clip", "gspo")
REDUCTIONS = {
    "token": "token-mean",
    "sequence": "seq-mean-token-mean",
    "constant": "seq-mean-token-sum-norm",
}
"""Ours, and verl's name for it."""


@pytest.fixture(scope="module")
def worker(tiny_model_directory: Path) -> TrainingWorker:
    return make_worker(tiny_model_directory)


def prepare(config: TrainerConfig, body: bytes, *, keep_all: bool = False) -> PreparedBatch:
    return prepare_batch(
        parse_batch(body),
        limits=ModelLimits(vocabulary_size=259, max_sequence_length=256),
        data=config.data,
        loss=config.loss,
        normalizer=AdvantageNormalizer(config.data.advantage_normalization),
        keep_all=keep_all,
    )


def of_reduction(name: str) -> list[str]:
    return [f"reduction={name}", *(["constant_length=16"] if name == "constant" else [])]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_an_engine_loss_makes_the_step_of_our_trainer(
    worker: TrainingWorker, tiny_model_directory: Path, tmp_path: Path, name: str, reduction: str
) -> None:
    settings = options([f"name={name}", *of_reduction(reduction)])
    config = config_for(tiny_model_directory, tmp_path, *settings)
    batch = prepare(config, trap_body())
    rows, info = make_step(batch, config.loss, multiple=7)  # rows that fill up change nothing
    theirs = verl_step(worker, engine_loss(config.loss), rows, info)
    assert_equal_steps(our_step(config, trap_body()), theirs)


@pytest.mark.parametrize(
    "settings",
    [
        ["name=clip_cov", "covariance_low=-1000", "covariance_high=1000", "covariance_share=0.2"],
        ["name=prime", "correction.weight=sequence_tis"],
    ],
    ids=["of the whole step", "with a correction"],
)
def test_losses_that_look_beyond_a_token_are_the_same_too(
    worker: TrainingWorker, tiny_model_directory: Path, tmp_path: Path, settings: list[str]
) -> None:
    config = config_for(tiny_model_directory, tmp_path, *options(settings))
    rows, info = make_step(prepare(config, trap_body()), config.loss, multiple=1)
    loss = pickle.loads(pickle.dumps(engine_loss(config.loss)))  # noqa: S301 - as it comes to a worker
    assert_equal_steps(our_step(config, trap_body()), verl_step(worker, loss, rows, info))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_policy_loss_within_verls_own_makes_the_step_of_our_trainer(
    worker: TrainingWorker, tiny_model_directory: Path, tmp_path: Path, name: str, reduction: str
) -> None:
    dual_clip = ["dual_clip=3"] if name == "ppo_clip" else []  # verl's default
    settings = [f"name={name}", *of_reduction(reduction), *dual_clip]
    config = config_for(tiny_model_directory, tmp_path, *options(settings))
    batch = prepare(config, trap_body(), keep_all=True)  # verl counts its denominators in what it gets
    rows, info = make_step(batch, config.loss, multiple=7)
    clip = {"low": 3e-4, "high": 4e-4} if name == "gspo" else {"low": 0.2, "high": 0.2}
    actor = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        use_dynamic_bsz=True,
        clip_ratio_low=clip["low"],
        clip_ratio_high=clip["high"],
        policy_loss=PolicyLossConfig(loss_mode=f"atropos_{name}"),
        loss_agg_mode=REDUCTIONS[reduction],
        loss_scale_factor=16,
    )
    theirs = verl_step(worker, partial(ppo_loss, config=actor), rows, info)
    assert_equal_steps(our_step(config, trap_body()), theirs)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_every_registered_policy_loss_computes(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(2, 5, generator=generator) - 0.5
    logprobs.requires_grad_()
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 0, 0]])
    actor = FSDPActorConfig(strategy="fsdp2", rollout_n=1, use_dynamic_bsz=True)
    loss, metrics = POLICY_LOSS_REGISTRY[f"atropos_{name}"](
        old_log_prob=logprobs.detach() - 0.01,
        log_prob=logprobs,
        advantages=torch.tensor([[1.0], [-1.0]]).expand(2, 5),
        response_mask=mask,
        loss_agg_mode="token-mean",
        config=actor,
    )
    loss.backward()
    assert logprobs.grad is not None
    assert torch.equal(logprobs.grad != 0, mask.bool())
    assert metrics["actor/negative_logprob"] > 0


def test_a_row_keeps_the_holes_of_several_turns_and_no_filler(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    config = config_for(tiny_model_directory, tmp_path, "--loss.name", "ppo_clip")
    batch = prepare(config, trap_body())
    rows, _ = make_step(batch, config.loss, multiple=5)
    assert len(rows) % 5 == 0
    assert len(rows) > len(batch.samples)
    names = ("prompts", "responses", "response_mask", "old_log_probs")
    columns = [[row.clone() for row in rows[name].unbind()] for name in names]
    assert not any(mask.any() for mask in columns[2][len(batch.samples) :])  # those that fill up
    for sample, *row in zip(batch.samples, *columns, strict=False):
        prompt, response, mask, sampler = row
        assert torch.equal(torch.cat([prompt, response]), sample.tokens)
        assert torch.equal(torch.cat([torch.zeros(len(prompt)), mask]), sample.loss_mask)
        assert mask[0] == 1
        assert 0 < mask.sum() < len(mask)
        assert (sampler[mask == 0] == 0).all()

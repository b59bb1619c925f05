"""The configuration of a run in verl, and how verl finds us."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.compose import ROOT
from trainer.errors import ConfigurationError
from verl_integration.main import main, require_loaded
from verl_integration.settings import our_config, read_config

MINIMAL: dict[str, Any] = {
    "actor_rollout_ref": {"model": {"path": "/models/base"}, "actor": {"strategy": "fsdp2"}},
    "trainer": {"total_training_steps": 7, "save_freq": 2, "default_local_dir": "runs/verl"},
    "atropos": {"url": "http://127.0.0.1:8000", "loss": {"name": "gspo"}},
}


ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


def write(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def test_the_section_is_our_configuration_and_the_tree_verls(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", MINIMAL)
    verl = read_config(path, ["atropos.loss.reduction=sequence", "trainer.nnodes=2"])
    ours = our_config(verl)
    assert (ours.loss.name, ours.loss.reduction, ours.train.steps) == ("gspo", "sequence", 7)
    assert ours.model.path == "/models/base"
    assert (verl.trainer.nnodes, verl.trainer.v1.trainer_mode) == (2, "atropos")
    assert verl.atropos.objective == "atropos"
    engine = verl.actor_rollout_ref.rollout.checkpoint_engine
    assert engine.backend == "atropos"
    assert engine.engine_kwargs.atropos.directory == str(Path("runs/verl/published").absolute())


@pytest.mark.parametrize("example", ["fsdp2_beside_vllm", "verl_starts_vllm"])
def test_the_examples_are_valid(example: str) -> None:
    verl = read_config(ROOT / "examples" / "verl" / f"{example}.yaml")
    starts = example == "verl_starts_vllm"
    assert (verl.actor_rollout_ref.rollout.name == "vllm") == starts
    assert (verl.actor_rollout_ref.rollout.checkpoint_engine.backend == "nccl") == starts
    assert our_config(verl).loss.needs_inference_logprobs


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainer.sawe_freq=3"], "sawe_freq"),
        (["atropos.loss.nmae=gspo"], "loss.nmae"),
        (["atropos.token=secret"], "ATROPOS_TRAINER_ATROPOS__TOKEN"),
        (["atropos.publish.token=secret"], "ATROPOS_TRAINER_PUBLISH__TOKEN"),
        (["atropos.objective=ours"], "none of atropos, verl"),
        (["atropos.objective=verl"], "atropos.loss.name has no effect"),
        (["atropos.loss.entropy_coefficient=0.1"], "atropos.loss.entropy_coefficient"),
        (["atropos.loss.reference=base", "atropos.loss.kl_coefficient=0.1"], "atropos.loss.reference"),
        (["atropos.journal.enabled=false"], "atropos.journal.enabled"),
        (["trainer.save_freq=-1"], "trainer.save_freq"),
        (["atropos.data.tokens_per_micro_batch=99"], "tokens_per_micro_batch"),
        # What verl has, and nobody would read.
        (["algorithm.adv_estimator=gae"], "algorithm.adv_estimator has no effect"),
        (["algorithm.use_kl_in_reward=true"], "algorithm.use_kl_in_reward has no effect"),
        (["data.train_batch_size=64"], "data.train_batch_size has no effect"),
        ([f"{ACTOR}.ppo_epochs=2"], "has no effect"),
        ([f"{ACTOR}.ppo_mini_batch_size=7"], "has no effect"),
        ([f"{ACTOR}.ppo_micro_batch_size_per_gpu=4"], "has no effect"),
        ([f"{ACTOR}.loss_agg_mode=seq-mean-token-mean"], "has no effect"),
        ([f"{ACTOR}.use_kl_loss=true"], "has no effect"),
        ([f"{ACTOR}.entropy_coeff=0.01"], "has no effect"),
        ([f"{ACTOR}.policy_loss.loss_mode=gspo"], "has no effect"),
        ([f"{ACTOR}.checkpoint.async_save=true"], "has no effect"),
        ([f"{ROLLOUT}.name=vllm"], "has no effect"),
        ([f"{ROLLOUT}.temperature=0.7", f"{ROLLOUT}.nnodes=1"], "temperature has no effect"),
        ([f"{ROLLOUT}.nnodes=1"], "set rollout.name"),
        ([f"{ROLLOUT}.nnodes=1", f"{ROLLOUT}.name=vllm"], "checkpoint_engine.backend"),
        (["trainer.nnodes=many"], "trainer.nnodes has to be like 1"),
        ([f"{ROLLOUT}.nnodes=many"], "nnodes has to be like 0"),
        (["trainer.save_freq"], "trainer.save_freq"),
        (["trainer.total_epochs=1"], "has no effect"),
        ([f"{ACTOR}.optim.lr_scheduler_type=linear"], "FSDPOptimizerConfig"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, words: list[str], said: str) -> None:
    with pytest.raises(Exception, match=said) as refused:
        read_config(write(tmp_path / "run.yaml", MINIMAL), words)
    assert "secret" not in str(refused.value)


def test_what_a_user_of_verl_writes_anyway_is_taken(tmp_path: Path) -> None:
    usual = ["algorithm.adv_estimator=grpo", f"{ACTOR}.use_dynamic_bsz=true", f"{ROLLOUT}.n=1"]
    verl = read_config(write(tmp_path / "run.yaml", MINIMAL), [*usual, "trainer.val_before_train=false"])
    assert verl.trainer.v1.trainer_mode == "atropos"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([f"{ACTOR}.loss_agg_mode=mean"], "Invalid loss_agg_mode"),
        ([f"{ACTOR}.policy_loss.loss_mode=atropos_clip_cov"], "Unsupported loss mode"),
        (["algorithm.rollout_correction.rollout_is=token"], "has no effect"),
    ],
)
def test_with_its_own_objective_verl_checks_its_settings(tmp_path: Path, words: list[str], said: str) -> None:
    path = write(tmp_path / "run.yaml", {**MINIMAL, "atropos": {"objective": "verl"}})
    its = [f"{ACTOR}.use_kl_loss=true", f"{ACTOR}.entropy_coeff=0.01", f"{ACTOR}.clip_ratio_high=0.28"]
    verl = read_config(path, [*its, f"{ACTOR}.policy_loss.loss_mode=atropos_cispo"])
    assert verl.actor_rollout_ref.actor.use_kl_loss
    assert our_config(verl).loss.needs_inference_logprobs
    with pytest.raises(Exception, match=said):
        read_config(path, words)


def test_a_wrong_configuration_ends_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing.yaml")]) == 2
    assert "nothing.yaml" in capsys.readouterr().err
    assert main([]) == 2


def test_verl_finds_us_by_its_entry_point() -> None:
    program = (
        "import verl; from verl.trainer.ppo.v1 import get_trainer_cls; "
        "from verl.trainer.ppo.core_algos import get_policy_loss_fn as f; "
        "print(get_trainer_cls('atropos').__name__, *f('atropos_gspo').args)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.stdout.split() == ["AtroposTrainer", "gspo"], done.stderr[-2000:]


def test_a_plugin_that_verl_did_not_load_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    require_loaded()
    monkeypatch.delitem(sys.modules, "verl_integration.plugin")
    with pytest.raises(ConfigurationError, match=r"entry point in verl\.plugins"):
        require_loaded()

"""Settings without effect, and other faults of an objective, are refused by their full names."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from trainer.config import TrainerConfig, load_config
from trainer.errors import ConfigurationError
from trainer.extensions import loss
from trainer.losses import LossInputs
from trainer.options import Options

INERT = {
    "loss.kl_estimator": ("k2", "loss.kl_coefficient", "0.1", "0"),
    "loss.kl_cap": ("1", "loss.kl_coefficient", "0.1", "0"),
    "loss.correction.ratio_cap": ("3", "loss.correction.weight", "token_tis", "none"),
    "loss.correction.icepop_low": ("0.6", "loss.correction.weight", "icepop", "none"),
    "loss.correction.icepop_high": ("4", "loss.correction.weight", "icepop", "none"),
    "loss.correction.reject_estimator": ("k2", "loss.correction.reject", "token", "none"),
    "loss.correction.reject_above": ("1", "loss.correction.reject", "token", "none"),
    "loss.correction.reject_below": ("-1", "loss.correction.reject", "token", "none"),
    "loss.entropy_step": ("0.01", "loss.entropy_target", "1", "none"),
    "distillation.coefficient": ("2", "distillation.mode", "forward_kl", "none"),
    "distillation.reward_coefficient": ("0", "distillation.mode", "forward_kl", "none"),
}


def load(*words: str) -> TrainerConfig:
    return load_config(None, ["--model.path", "m", *words], environment={})


@pytest.mark.parametrize("name", INERT)
def test_an_option_of_what_is_not_chosen_is_refused(name: str) -> None:
    value, choice, chosen, off = INERT[name]
    message = rf"^  {re.escape(name)}: it has no effect without {re.escape(choice)}"
    with pytest.raises(ConfigurationError, match="(?m)" + message):
        load(f"--{name}", value)
    load(f"--{name}", value, f"--{choice}", chosen)
    config = load(f"--{name}", value, f"--{choice}", off)  # as in a sweep that begins with none
    assert TrainerConfig.model_validate(config.model_dump()).model_dump() == config.model_dump()


def test_an_option_of_another_weight_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"icepop_high: it has no effect without loss\.corr.* icepop:"
    ):
        load("--loss.correction.weight", "token_tis", "--loss.correction.icepop_high", "4")


@pytest.mark.parametrize("words", [[], ["--loss.reduction", "token"], ["--loss.preset", "dapo"]])
def test_a_constant_that_no_reduction_divides_by_is_refused(words: list[str]) -> None:
    with pytest.raises(
        ConfigurationError, match=r"constant_length: it has no effect without loss\.reduction"
    ):
        load("--loss.constant_length", "64", *words)
    load("--loss.constant_length", "64", "--loss.reduction", "constant")
    load("--loss.constant_length", "64", "--loss.preset", "rloo")


def test_a_default_that_is_written_is_no_fault() -> None:
    load(
        "--loss.kl_estimator",
        "k3",
        "--loss.correction.reject_above",
        "0.7",
        "--distillation.coefficient",
        "1",
    )


def test_faults_of_a_section_begin_with_the_full_setting() -> None:
    with pytest.raises(ConfigurationError, match=r"(?m)^  loss\.correction\.reject_estimator k1 may be neg"):
        load("--loss.correction.reject", "sequence_max")


@loss()
def vec(inputs: LossInputs, options: Options) -> Any:
    return inputs.logprobs


@loss()
def falls(inputs: LossInputs, options: Options) -> Any:
    raise KeyError("k")


@pytest.mark.parametrize(("name", "fault"), [("vec", "returned"), ("falls", "raised KeyError: 'k'")])
def test_a_fault_of_a_loss_of_the_users_begins_with_the_full_setting(name: str, fault: str) -> None:
    config = load("--loss.name", f"{__name__}:{name}")
    one = torch.ones(1)
    inputs = LossInputs(
        logprobs=-one, advantages=one, loss_mask=one, sequence_ids=torch.zeros(1, dtype=torch.int64)
    )
    with pytest.raises(ConfigurationError, match=rf"^loss\.name {__name__}:{name} {fault}"):
        config.loss.bound(inputs)

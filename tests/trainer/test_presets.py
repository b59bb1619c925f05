"""Presets by paper: what each comes to, what wins over it, and where it is said."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from schemas import BatchReply
from tests.trainer.batches import VOCABULARY, make_group
from trainer import RecordedSource
from trainer.cli._run import train
from trainer.cli._settings import settings_help
from trainer.config import (
    PRESETS,
    PresetName,
    TrainerConfig,
    describe_preset,
    load_config,
    refuse_changed_settings,
)
from trainer.errors import ConfigurationError
from trainer.extensions import loss
from trainer.losses import LossInputs
from trainer.options import ClipOptions
from trainer.samples.advantages import AdvantageNormalizer
from trainer.samples.prepare import prepare_batch
from trainer.samples.validation import ModelLimits

CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.2}
# Written down from the papers and other trainers' code, not from ours; `trainer/config/_presets.py` says from
# which section or file.
OBJECTIVES: dict[str, tuple[str, dict[str, Any], str, str, dict[str, Any]]] = {
    "grpo": ("ppo_clip", CLIP, "sequence", "group_norm", {"std": "n-1"}),
    "dr_grpo": ("ppo_clip", CLIP, "constant", "group_center", {}),
    "dapo": ("ppo_clip", CLIP | {"epsilon_high": 0.28}, "token", "group_norm", {"std": "n-1"}),
    "intellect2": ("ppo_clip", CLIP | {"two_sided": 4.0}, "token", "group_norm", {"std": "n-1"}),
    "luspo": (
        *("luspo", {"epsilon_low": 2e-3, "epsilon_high": 2.5e-3}, "sequence"),
        *("group_norm", {"std": "n-1"}),
    ),
    "gmpo": ("gmpo", {"epsilon_low": 0.4, "epsilon_high": 0.4}, "sequence", "group_norm", {"std": "n-1"}),
    "sapo": (
        "sapo",
        {"temperature_positive": 1.0, "temperature_negative": 1.05},
        "sequence",
        "group_norm",
        {"std": "n-1"},
    ),
    "vespo": (
        "vespo",
        {"power_positive": 2.0, "rate_positive": 3.0, "power_negative": 3.0, "rate_negative": 2.0},
        "token",
        "group_norm",
        {"std": "n-1"},
    ),
    "dppo": (
        *("dppo_tv", {"epsilon_low": 0.15, "epsilon_high": 0.15, "ratio_cap": 20.0}, "constant"),
        *("group_center", {}),
    ),
    "icepop": (
        "weighted_sft",
        {"correction": {"weight": "icepop", "icepop_low": 0.5, "icepop_high": 5.0}},
        "sequence",
        "group_norm",
        {"std": "n-1"},
    ),
    "prime_rl": ("prime", CLIP | {"mismatch_penalty": 1e-3}, "token", "group_center", {}),
    "ipo": (
        *("ipo", {"epsilon": 0.3, "mismatch_penalty": 0.0, "ratio_cap": 10000.0}, "token"),
        *("group_center", {}),
    ),
    "gspo": ("gspo", {"epsilon_low": 3e-4, "epsilon_high": 4e-4}, "sequence", "group_norm", {"std": "n-1"}),
    "cispo": ("cispo", {"epsilon_low": 1.0, "epsilon_high": 4.0}, "token", "group_norm", {"std": "n-1"}),
    "rloo": ("policy_gradient", {"ratio_cap": 2.0}, "constant", "leave_one_out", {}),
    "reinforce++": ("ppo_clip", CLIP, "token", "reinforce_plus_plus_baseline", {}),
    "opo": ("policy_gradient", {"ratio_cap": 2.0}, "token", "opo", {}),
    "gpg": ("weighted_sft", {}, "token", "gpg", {}),
    "lite_ppo": ("ppo_clip", CLIP, "token", "batch_std", {"std": "n-1"}),
    "opd": ("policy_gradient", {"ratio_cap": 2.0}, "token", "raw", {}),
}


# The same settings by hand, as a file has them.
OVER_ANY: dict[str, dict[str, Any]] = {
    name: {
        "loss": {"name": loss_name, "reduction": reduction, **options},
        "data": {
            "advantage_estimator": estimator,
            "advantage_options": of_estimator,
            "advantage_normalization": "batch",
        },
        "distillation": {"mode": "forward_kl", "reward_coefficient": 0.5},
    }
    for name, (loss_name, options, reduction, estimator, of_estimator) in OBJECTIVES.items()
}


def load(*words: str, file: Path | None = None, **environment: str) -> TrainerConfig:
    return load_config(file, ["--model.path", "m", *words], environment=environment)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_comes_to_the_objective_of_its_paper(name: str) -> None:
    loss, loss_options, reduction, estimator, estimator_options = OBJECTIVES[name]
    config = load("--loss.preset", name)
    by_hand = TrainerConfig.model_validate(
        {
            "model": {"path": "m"},
            "loss": {"name": loss, "reduction": reduction, **loss_options},
            "data": {"advantage_estimator": estimator, "advantage_options": estimator_options},
            "distillation": {"mode": "sampled_token", "reward_coefficient": 0} if name == "opd" else {},
        }
    )
    assert config.model_dump() == by_hand.model_dump() | {
        "loss": by_hand.loss.model_dump() | {"preset": name}
    }
    assert config.loss.bound == by_hand.loss.bound
    assert not config.loss.bound.needs_ref_logprobs, "a preset works without a reference"
    assert config.data.bound_estimator == by_hand.data.bound_estimator


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_moves_the_policy_from_a_batch_of_groups(name: str) -> None:
    """From the groups to a gradient, without a model: the policy is near the sampler."""
    generator = random.Random(1)
    groups = [make_group(generator, scores=[1.0, 0.0, 0.0, 1.0]) for _ in range(2)]
    for group in groups:
        group["distill_token_ids"] = [[[token] for token in row] for row in group["tokens"]]
        group["distill_logprobs"] = [[[-generator.random()] for _ in row] for row in group["tokens"]]
    config = load("--loss.preset", name)
    batch = prepare_batch(
        BatchReply.model_validate_json(json.dumps({"batch": groups})),
        limits=ModelLimits(vocabulary_size=VOCABULARY, max_sequence_length=64),
        data=config.data,
        loss=config.loss,
        normalizer=AdvantageNormalizer(config.data.advantage_normalization),
        distillation=config.distillation,
    )
    assert len(batch.samples) == 8
    lengths = torch.tensor([len(sample.tokens) for sample in batch.samples])
    sampler = torch.cat(
        [sample.inference_logprobs for sample in batch.samples if sample.inference_logprobs is not None]
    )
    logprobs = (sampler + 1e-4).requires_grad_()
    mask = torch.cat([sample.loss_mask for sample in batch.samples])
    value, _ = config.loss.bound(
        LossInputs(
            logprobs=logprobs,
            advantages=torch.cat([sample.advantages for sample in batch.samples]),
            loss_mask=mask,
            inference_logprobs=sampler,
            denominator=torch.tensor(batch.denominators).repeat_interleave(lengths),
            sequence_ids=torch.arange(8).repeat_interleave(lengths),
        )
    )
    (gradient,) = torch.autograd.grad(value, logprobs)
    assert gradient.isfinite().all()
    assert torch.equal(gradient != 0, mask != 0)


def test_there_is_one_of_each_name() -> None:
    assert tuple(PRESETS) == get_args(PresetName)
    assert set(OBJECTIVES) == set(PRESETS)


def test_what_is_set_by_hand_wins_wherever_it_is_set(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("loss: {preset: dapo, epsilon_high: 0.25}\n")
    config = load(
        *("--data.advantage_options.std", "n"),
        file=tmp_path / "run.yaml",
        ATROPOS_TRAINER_LOSS__REDUCTION="sequence",
    )
    options = config.loss.bound.options.model_dump()
    assert (options["epsilon_low"], options["epsilon_high"]) == (0.2, 0.25)
    assert config.loss.reduction == "sequence"
    assert config.data.bound_estimator.options.model_dump() == {"std": "n"}
    assert describe_preset("dapo", config) == (
        "loss.name ppo_clip, loss.epsilon_low 0.2, loss.epsilon_high 0.25 (by hand, in place of 0.28), "
        "loss.reduction sequence (by hand, in place of token), data.advantage_estimator group_norm, "
        "data.advantage_options.std n (by hand, in place of n-1), data.advantage_normalization none"
    )


def test_a_preset_wins_over_lower_layers_and_gives_way_to_its_own_and_higher_ones(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "loss: {name: policy_gradient, ratio_cap: 3, kl_coefficient: 0.1, max_staleness: 2}\n"
        "data: {advantage_estimator: length_shaping, advantage_options: {weight: 0.2}, "
        "advantage_normalization: batch}\n"
    )
    config = load("--loss.preset", "dapo", "--loss.epsilon_high", "0.3", file=file)
    alone = load("--loss.preset", "dapo", "--loss.epsilon_high", "0.3", "--loss.kl_coefficient", "0.1")
    assert config.loss.bound == alone.loss.bound
    assert config.data.model_dump() == alone.data.model_dump()
    assert config.loss.max_staleness == 2, "which no preset decides"
    assert describe_preset("dapo", config) == (
        "loss.name ppo_clip (in place of the file's policy_gradient), loss.epsilon_low 0.2, "
        "loss.epsilon_high 0.3 (by hand, in place of 0.28), loss.reduction token, "
        "data.advantage_estimator group_norm (in place of the file's length_shaping), "
        "data.advantage_options.std n-1, "
        "data.advantage_normalization none (in place of the file's batch); "
        "added by hand: loss.kl_coefficient 0.1, loss.max_staleness 2; "
        "left out of the file: loss.ratio_cap 3, data.advantage_options.weight 0.2"
    )
    below = load("--loss.preset", "dapo", file=file, ATROPOS_TRAINER_LOSS__REDUCTION="sequence")
    variable = "environment variable ATROPOS_TRAINER_LOSS__REDUCTION"
    assert f"loss.reduction token (in place of {variable}'s sequence)" in describe_preset("dapo", below)
    between = load(file=file, ATROPOS_TRAINER_LOSS__PRESET="dapo")
    assert between.loss.bound == below.loss.bound
    above = load("--loss.name", "gspo", file=file, ATROPOS_TRAINER_LOSS__PRESET="dapo")
    assert (above.loss.name, above.loss.bound.options.model_dump()["epsilon_high"]) == ("gspo", 4e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_on_the_command_line_is_the_same_over_any_file(name: PresetName, tmp_path: Path) -> None:
    alone = load("--loss.preset", name)
    file = tmp_path / "run.yaml"
    for other in PRESETS:
        file.write_text(json.dumps(OVER_ANY[other]))
        config = load("--loss.preset", name, file=file)
        assert (config.loss.bound, config.loss.reduction) == (alone.loss.bound, alone.loss.reduction)
        assert config.data.model_dump() == alone.data.model_dump()
        assert name != "opd" or config.distillation.model_dump() == alone.distillation.model_dump()


def test_the_demonstration_trains_the_preset_that_is_asked_for() -> None:
    demo = Path(__file__).parents[2] / "local_stack/demo.yaml"
    words = ("--publish.servers", "http://127.0.0.1:1")
    config, alone = load("--loss.preset", "dapo", *words, file=demo), load("--loss.preset", "dapo")
    assert config.loss.model_dump() == alone.loss.model_dump()
    assert config.data.bound_estimator == alone.data.bound_estimator
    assert config.data.advantage_normalization == "none"


def test_a_preset_hides_no_mistake_of_a_lower_layer(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("loss: {epsilno_high: 0.2}\n")
    with pytest.raises(ConfigurationError, match=r"epsilno_high.*did you mean epsilon_high"):
        load("--loss.preset", "dapo", file=tmp_path / "run.yaml")


@pytest.mark.parametrize("name", PRESETS)
def test_each_setting_of_each_preset_gives_way_to_one_by_hand(name: PresetName) -> None:
    settings = PRESETS[name].settings
    by_hand = {
        "loss.name": "ppo_clip" if settings["loss.name"] == "weighted_sft" else "weighted_sft",
        "loss.correction.weight": "token_tis",
        "loss.correction.icepop_high": "4.0",
        "loss.two_sided": "1.5",
        "loss.reduction": "token" if settings["loss.reduction"] != "token" else "constant",
        "data.advantage_estimator": "raw"
        if settings["data.advantage_estimator"] != "raw"
        else "group_center",
        "data.advantage_options.std": "n",
        "data.advantage_normalization": "batch",
        "distillation.mode": "reverse_kl",
    }
    for setting, value in settings.items():
        other = by_hand.get(setting, "0.35")
        if other != value:
            config = load("--loss.preset", name, f"--{setting}", other)
            assert f"{setting} {other} (by hand, in place of {value})" in describe_preset(name, config)


def test_another_function_by_hand_gets_none_of_the_options() -> None:
    config = load("--loss.preset", "dapo", "--loss.name", "policy_gradient")
    assert config.loss.bound == load("--loss.name", "policy_gradient").loss.bound
    assert config.data.bound_estimator.options.model_dump() == {"std": "n-1"}
    config = load("--loss.preset", "dapo", "--data.advantage_estimator", "length_shaping")
    assert config.data.bound_estimator.options.model_dump() == {"weight": 0.1}
    assert "; left out of the preset: data.advantage_options.std n-1" in describe_preset("dapo", config)
    config = load("--loss.preset", "icepop", "--loss.name", "cispo")
    assert config.loss.bound == load("--loss.name", "cispo").loss.bound
    assert describe_preset("icepop", config).endswith(
        "; left out of the preset: loss.correction.weight icepop, loss.correction.icepop_low 0.5, "
        "loss.correction.icepop_high 5.0"
    )
    config = load("--loss.preset", "gmpo", "--loss.name", "sapo")
    line = describe_preset("gmpo", config)
    assert "loss.temperature_positive 1.0, loss.temperature_negative 1.05, loss.reduction" in line
    assert line.endswith("; left out of the preset: loss.epsilon_low 0.4, loss.epsilon_high 0.4")
    config = load("--loss.preset", "icepop", "--loss.correction.icepop_high", "3")
    assert config.loss.bound.options.model_dump()["correction"]["weight"] == "icepop"
    assert "loss.correction.icepop_high 3.0 (by hand, in place of 5.0)" in describe_preset("icepop", config)
    line = describe_preset("icepop", load("--loss.preset", "icepop", "--loss.correction.weight", "token_tis"))
    assert "loss.correction.ratio_cap 2.0" in line
    assert "icepop_" not in line.partition("; left out of the preset: loss.correction.icepop_low 0.5")[0]


def test_another_mode_of_distillation_by_hand_gets_none_of_the_options() -> None:
    config = load("--loss.preset", "opd", "--distillation.mode", "none")
    assert config.distillation.model_dump() == load().distillation.model_dump()
    assert describe_preset("opd", config).endswith(
        "distillation.mode none (by hand, in place of sampled_token); "
        "left out of the preset: distillation.reward_coefficient 0.0"
    )


def test_sections_may_be_models_too() -> None:
    plain = load("--loss.preset", "dapo")
    again = TrainerConfig(model=plain.model, loss=plain.loss, data=plain.data)
    assert again.model_dump() == plain.model_dump()


@pytest.mark.parametrize("value", ["grppo", "[1]", "{a: b}"])
def test_an_unknown_preset_is_refused_with_those_that_there_are(value: str) -> None:
    with pytest.raises(ConfigurationError, match=r"loss\.preset: .*'grpo', 'dr_grpo'"):
        load("--loss.preset", value)


def test_a_resume_compares_what_a_preset_came_to() -> None:
    stored = load("--loss.preset", "dapo").model_dump(mode="json")
    by_hand = (
        "--loss.name",
        "ppo_clip",
        "--loss.epsilon_high",
        "0.28",
        "--data.advantage_options.std",
        "n-1",
    )
    refuse_changed_settings(stored, load(*by_hand), checkpoint="step-1")
    with pytest.raises(ConfigurationError) as told:
        refuse_changed_settings(stored, load("--loss.preset", "grpo"), checkpoint="step-1")
    assert "loss.epsilon_high: 0.28 in the checkpoint, 0.2 now" in str(told.value)
    assert "--train.resume_changes loss.reduction,loss.epsilon_high;" in str(told.value)


def cell(function: str, options: dict[str, Any]) -> str:
    """What the page's table has for a function with its options."""
    flat = dict(options)
    for name, value in flat.pop("correction", {}).items():
        flat[f"correction.{name}"] = value
    return f"`{function}`" + ": " * bool(flat) + ", ".join(f"{name} {value}" for name, value in flat.items())


def test_help_and_page_say_what_each_comes_to() -> None:
    text = settings_help()
    page = (Path(__file__).parents[2] / "docs/advantages.md").read_text()
    for name, preset in PRESETS.items():
        assert f"\n        {name}: {describe_preset(name)}\n" in text
        loss, loss_options, reduction, estimator, estimator_options = OBJECTIVES[name]
        row = f"| {cell(loss, loss_options)} | `{reduction}` | {cell(estimator, estimator_options)} |"
        assert f"\n| `{name}` | {preset.paper} {row}\n" in page


def test_the_first_line_of_a_run_says_what_its_preset_came_to(
    tiny_model_directory: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A command that another test called may have left a handler with a stream that is closed.
    monkeypatch.setattr(logging.getLogger(), "handlers", [caplog.handler])
    caplog.set_level(logging.INFO)
    words = ("--model.path", str(tiny_model_directory), "--train.output_dir", str(tmp_path / "run"))
    words += ("--train.steps", "0", "--train.device", "cpu", "--train.mixed_precision", "no")
    words += ("--loss.preset", "gspo", "--loss.reduction", "token")
    config = load_config(None, words, environment={})
    train(config, source=RecordedSource(()))
    assert caplog.messages[0] == (
        "loss.preset gspo: loss.name gspo, loss.epsilon_low 0.0003, loss.epsilon_high 0.0004, loss.reduction "
        "token (by hand, in place of sequence), data.advantage_estimator group_norm, "
        "data.advantage_options.std n-1, data.advantage_normalization none"
    )


def test_the_line_of_a_preset_says_whatever_else_changes_the_objective() -> None:
    words = ("--loss.dual_clip", "3", "--loss.correction.reject", "token", "--loss.kl_coefficient", "0.1")
    words += ("--distillation.mode", "forward_kl", "--distillation.coefficient", "0.5")
    untouched = ("--loss.kl_estimator", "k3", "--loss.max_staleness", "none", "--data.packing", "plain")
    line = describe_preset("dapo", load("--loss.preset", "dapo", *words, *untouched))
    assert line == describe_preset("dapo") + (
        "; added by hand: loss.kl_coefficient 0.1, loss.correction.reject token, loss.dual_clip 3.0, "
        "distillation.mode forward_kl, distillation.coefficient 0.5"
    )


@loss(ClipOptions)
def clip_of_ours(inputs: LossInputs, options: ClipOptions) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return inputs.logprobs.sum(), {}


def test_the_line_of_a_preset_names_the_options_of_another_loss() -> None:
    line = describe_preset("dapo", load("--loss.preset", "dapo", "--loss.name", "gspo"))
    assert line.startswith(
        "loss.name gspo (by hand, in place of ppo_clip), loss.epsilon_low 0.0003, loss.epsilon_high 0.0004, "
        "loss.form sequence, loss.reduction token"
    )
    ours = f"{__name__}:clip_of_ours"
    config = load("--loss.preset", "gspo", "--loss.name", ours, "--loss.epsilon_low", "0.1")
    assert describe_preset("gspo", config).startswith(
        f"loss.name {ours} (by hand, in place of gspo), loss.epsilon_low 0.1, "
        "loss.epsilon_high 0.2, loss.reduction sequence"
    )


def test_the_line_of_a_preset_names_the_constant_length_where_it_counts() -> None:
    length = "loss.reduction constant, loss.constant_length"
    assert f"{length} 1024, data" in describe_preset("dr_grpo", load("--loss.preset", "dr_grpo"))
    line = describe_preset("rloo", load("--loss.preset", "rloo", "--loss.constant_length", "64"))
    assert f"{length} 64, data" in line
    assert "by hand" not in line
    assert "constant_length" not in describe_preset("dapo", load("--loss.preset", "dapo"))

"""The configuration: one name for a setting everywhere, and no wrong one is ever ignored."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import certifi
import pytest

from trainer.config import TrainerConfig, config_fields, load_config
from trainer.errors import ConfigurationError

MODEL = ("--model.path", "some/model")


def load(*overrides: str, file: Path | None = None, **environment: str) -> TrainerConfig:
    return load_config(file, overrides, environment=environment)


def test_command_line_wins_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: from-file}\ntrain: {steps: 1, seed: 1}\noptimizer: {weight_decay: 0.5}\n")
    config = load(
        "--train.steps", "3", file=file, ATROPOS_TRAINER_TRAIN__STEPS="2", ATROPOS_TRAINER_TRAIN__SEED="2"
    )
    assert (config.train.steps, config.train.seed) == (3, 2)
    assert config.optimizer.weight_decay == 0.5
    assert config.optimizer.learning_rate == 1e-6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.stepz", "3"], r"train\.stepz: there is no such setting; did you mean train\.steps\?"),
        (
            ["--train.resume_changes", "optimizer.learning_rat"],
            r"no such setting; did you mean optimizer\.learning_rate\?",
        ),
        (["--train.resume_changes", "optimiser.*"], r"names 'optimiser\.\*': there is no such setting"),
        (["--trian.steps", "3"], r"trian: there is no such setting; did you mean train\?"),
        (["--nonsense.key", "3"], r"the sections are: model, atropos"),
        (["--train.completely_else", "3"], r"train has: steps, seed"),
        (["--train.steps", "many"], r"train\.steps: .*integer.*found 'many'"),
        (["--train.steps", "-1"], r"train\.steps: .*greater than or equal to 0"),
        (
            ["--loss.name", "dpo"],
            r"loss\.name: there is no loss 'dpo'.*weighted_sft, policy_gradient, ppo_cl",
        ),
        (["--loss.name", "ppo_clp"], r"loss\.name: .*did you mean ppo_clip\?"),
        (
            ["--loss.ratio_cap", "3"],
            r"loss\.ratio_cap: loss weighted_sft has no option ratio_cap: .*kl_coefficient",
        ),
        (["--loss.name", "ppo"], r"loss\.name: .*did you mean ppo_clip\?"),
        (["--loss.name", "GSPO"], r"loss\.name: .*did you mean gspo\?"),
        (["--loss.name", "grpo"], r"loss\.name: .*grpo is a preset.* \(--loss\.preset grpo\)"),
        (["--loss.name", "DAPO"], r"loss\.name: .*dapo is a preset.* \(--loss\.preset dapo\)"),
        (["--loss.preset", "drgrpo"], r"loss\.preset: .*did you mean dr_grpo\?"),
        (["--loss.preset", "GRPO"], r"loss\.preset: .*did you mean grpo\?"),
        (["--loss.preset", "reinforce_plus_plus"], r"loss\.preset: .*did you mean reinforce\+\+\?"),
        (["--loss.correction.rejct", "k"], r"rejct: .*did you mean loss\.correction\.reject\?"),
        (["--loss.correction.off_policy_limt", "1"], r"did you mean loss\.correction\.off_policy_limit\?"),
        (["--loss.correction.else", "1"], r"else: .*; loss\.correction has: weight, ratio_cap"),
        (
            ["--data.reward_kl_coefficient", "0.1", "--loss.reference", "base"],
            r"that environments send .* loss\.reference base is computed here.*leave loss\.reference out",
        ),
        (["--model.lora.rnk", "4"], r"did you mean model\.lora\.rank\?"),
        (
            ["--loss.name", "clip_cov", "--loss.covariance_low", "6"],
            r"covariance_low 6\.0 is not below covariance_high 5\.0",
        ),
        (["--loss.reducton", "3"], r"no option reducton \(did you mean reduction\?\)"),
        (["--loss.name", "ppo_clip", "--loss.epsilon_low", "2"], r"loss\.epsilon_low: .*less than 1 .*'2'"),
        (["--data.advantage_estimator", "gae"], r"data\.advantage_estimator: there is no .*estimator 'gae'"),
        (
            ["--data.advantage_options.x", "1"],
            r"data\.advantage_options\.x: .* group_norm has no option x: its options are std",
        ),
        (["--atropos.url", "localhost:8000"], r"atropos\.url: .*http://"),
        (["--atropos.url", "http://a:99999"], r"atropos\.url: it names no host, or a port that is none"),
        (["--atropos.url", "http://[::1"], r"atropos\.url: it names no host"),
        (["--publish.servers", "http://"], r"publish\.servers: it names no host"),
        (
            ["--atropos.ca_file", "/dev/null"],
            r"atropos\.ca_file: no certificate authorities .*found '/dev/null'",
        ),
        (["--publish.transport", "disk"], r"publish\.servers is empty"),
        (["--data.advantage_clip", "[1, 5]"], r"around 0"),
        (["--optimizer.learning_rate", "nan"], r"optimizer\.learning_rate: .*finite"),
        (["--checkpoint.keep_every", "75"], r"keep_every 75 is not a multiple of every"),
        (["--train.steps"], r"--train\.steps needs a value"),
        (["steps=3"], r"unexpected argument 'steps=3'"),
        (["--model", "x", "--model.path", "y"], r"model: it must hold settings below it \(found 'x'\)"),
        (["--publish.servers", "[http://a"], r"not a valid list"),
        (["--atropos.headers", "{a: 1, a: 2}"], r"not a valid list or mapping"),
        (["--model.path="], r"model\.path: it is empty"),
        (["--train.output_dir="], r"train\.output_dir: it is empty"),
        (["--train.output_dir", "~nobody-has-it/x"], r"nobody has the home directory ~nobody-has-it"),
        (["--logging.trackers", "tensorboard,trackio"], r"logging\.trackers needs the package trackio: pip"),
        (["--train", "3"], r"train: it must hold settings below it"),
    ],
)
def test_what_is_wrong_is_refused_by_name_with_what_is_allowed(words: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load(*MODEL, *words)


def test_all_wrong_settings_are_told_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        load("--train.steps", "x", "--loss.name", "y", "--foo.bar", "z")
    assert all(name in str(caught.value) for name in ("model.path", "train.steps", "loss.name", "foo"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("TRAIN__STEPZ", "3", r"\(environment variable ATROPOS_TRAINER_TRAIN__STEPZ\): there is no such"),
        ("TRAIN__STEPS", "x", r"\(environment variable ATROPOS_TRAINER_TRAIN__STEPS\): .*integer"),
        ("TRAIN", "oops", r"\(environment variable ATROPOS_TRAINER_TRAIN\): it must hold settings"),
        ("TRAIN", "{steps: x}", r"\(environment variable ATROPOS_TRAINER_TRAIN\): .*integer"),
        ("TRIAN__STEPS", "3", r"\(environment variable ATROPOS_TRAINER_TRIAN__STEPS\).*did you mean train\?"),
        ("TRAIN_STEPS", "3", r"ATROPOS_TRAINER_TRAIN_STEPS: .*use ATROPOS_TRAINER_TRAIN__STEPS"),
    ],
)
def test_a_wrong_environment_variable_of_ours_is_refused_by_its_name(
    name: str, text: str, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load(*MODEL, **{f"ATROPOS_TRAINER_{name}": text})


def test_a_variable_is_blamed_for_what_it_says_only() -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(
            *MODEL, "--train.steps", "x", ATROPOS_TRAINER_TRAIN__STEPS="3", ATROPOS_TRAINER_TRAIN="{seed: y}"
        )
    assert "train.steps: " in str(caught.value)
    assert "train.seed (environment variable ATROPOS_TRAINER_TRAIN): " in str(caught.value)


def test_what_stands_in_the_place_of_a_section_is_refused_though_a_setting_below_it_is_given(
    tmp_path: Path,
) -> None:
    refused = r"train \(environment variable ATROPOS_TRAINER_TRAIN\): it must hold settings .*'oops'"
    with pytest.raises(ConfigurationError, match=refused):
        load(*MODEL, "--train.steps", "3", ATROPOS_TRAINER_TRAIN="oops")
    (tmp_path / "run.yaml").write_text("train: oops\n")
    with pytest.raises(ConfigurationError, match=r"train: it must hold settings .*'oops'"):
        load(*MODEL, "--train.steps", "3", file=tmp_path / "run.yaml")


def test_what_kubernetes_sets_for_services_of_our_name_does_not_matter() -> None:
    port = {"PORT": "tcp://10.0.0.1:80", "PORT_80_TCP": "tcp://10.0.0.1:80", "PORT_80_TCP_ADDR": "10.0.0.1"}
    service = {**port, "SERVICE_HOST": "10.0.0.1", "SERVICE_PORT": "80", "SERVICE_PORT_HTTP": "80"}
    # The second is of a service `atropos-trainer-health`, whose port has the words of a setting.
    names = [f"ATROPOS_TRAINER_{more}{name}" for more in ("", "HEALTH_") for name in service]
    others = {"STEPS": "3", "HOME": "/"}
    assert load(*MODEL, **others, **dict(zip(names, [*service.values()] * 2, strict=True))) == load(*MODEL)


def test_lists_can_be_written_with_commas_or_as_yaml() -> None:
    urls = ["http://a:1", "http://b:2"]
    for text in ("http://a:1,http://b:2/", "[http://a:1, 'http://b:2']"):
        assert load(*MODEL, "--publish.servers", text).publish.servers == urls


def test_every_list_setting_but_one_of_texts_takes_commas() -> None:
    given = {
        "publish.servers": "http://a:1,http://b:2",
        "logging.trackers": "tensorboard,wandb",
        "model.lora.target_modules": "q_proj,v_proj",
        "data.advantage_clip": "-5,5",
        "train.resume_changes": "optimizer.beta1,optimizer.beta2",
    }
    lists = {field.name for field in config_fields() if field.type_name.startswith(("list[", "tuple["))}
    assert lists | {"model.lora.target_modules"} == {*given, "publish.probes"}
    config = load(*MODEL, *(word for name, text in given.items() for word in (f"--{name}", text)))
    assert config.model.lora is not None
    assert config.model.lora.target_modules == ["q_proj", "v_proj"]
    assert config.data.advantage_clip == (-5.0, 5.0)
    assert load(*MODEL, "--model.lora.target_modules", "all-linear").model.lora is not None


@pytest.mark.parametrize("way", ["command line", "file"])
def test_a_home_directory_is_expanded_in_every_path(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").mkdir()
    shutil.copy(certifi.where(), tmp_path / "x/y")  # for atropos.ca_file
    names = [field.name for field in config_fields() if "path" in field.type_name.split("|")]
    names += ["model.path", "model.tokenizer_path"]
    for name in names:
        section, _, key = name.partition(".")
        (tmp_path / "run.yaml").write_text(f"{section}: {{{key}: ~/x/y}}" if way == "file" else "{}")
        words = (f"--{name}", "~/x/y") if way == "command line" else ()
        others = () if name == "model.path" else MODEL
        config = load(*others, *words, file=tmp_path / "run.yaml")
        assert str(getattr(getattr(config, section), key)) == str(tmp_path / "x/y"), name
    assert len(names) > 4


def test_words_that_look_like_numbers_stay_words() -> None:
    config = load(*MODEL, ATROPOS_TRAINER_PUBLISH__TOKEN="0123")  # noqa: S106
    assert config.publish.token is not None
    assert config.publish.token.get_secret_value() == "0123"


@pytest.mark.parametrize("name", ["data.advantage_normalization", "publish.transport"])
def test_a_setting_whose_value_is_called_none_takes_it_from_the_command_line(name: str) -> None:
    section, field = name.split(".")
    assert getattr(getattr(load(*MODEL, f"--{name}", "none"), section), field) == "none"


def test_none_is_none_wherever_the_help_says_that_it_is_the_default(tmp_path: Path) -> None:
    optional = [field.name for field in config_fields() if field.default == "none"]
    optional = [name for name in optional if not name.endswith(".token")]  # a token is any text
    named_none = {"data.advantage_normalization", "distillation.mode", "publish.transport", "model.dropout"}
    assert "loss.preset" in optional
    assert "model.lora.rank" not in optional
    for name in optional:
        config: Any = load(*MODEL, f"--{name}", "none")
        for part in name.split("."):
            config = getattr(config, part)
        assert config == ("none" if name in named_none else None), name
    file = tmp_path / "run.yaml"
    file.write_text("loss: {preset: intellect2, two_sided: none}\nmodel: {lora: None, path: m}\n")
    config = load(file=file)
    assert config.loss.bound.options.model_dump()["two_sided"] is None
    assert config.model.lora is None
    options = load(*MODEL, "--loss.correction.weight", "none", "--loss.kl_cap", "none").loss.bound.options
    assert options.model_dump()["kl_cap"] is None


def test_null_clears_a_setting(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: m, lora: {rank: 4}}\n")
    assert load(file=file).model.lora is not None
    assert load("--model.lora", "null", file=file).model.lora is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must hold sections"),
        ("a: [", "not valid YAML"),
        ("model: 3\n", "model: it must hold settings"),
        ("train:\n", r"train: it must hold settings below it \(found None\)"),
        ("loss: {name: ppo_clip}\nmodel: {path: m}\nloss: {}\n", "'loss' is written twice in line 3"),
        ("model:\n  path: m\n  lora: {rank: 1, 'rank': 2}\n", "'rank' is written twice in line 3"),
        ("publish: {headers: {a: x, a: y}}\n", "'a' is written twice in line 1"),
        ("? [a, b]\n: 3\n", "not valid YAML"),
        ("train: {steps: true}\n", r"train\.steps: .*found 'true'"),
        ("train: {output_dir: ''}\n", r"train\.output_dir: it is empty"),
        ('train: {output_dir: "a\\0b"}\n', r"train\.output_dir: .*NUL"),
    ],
)
def test_files_that_are_no_configuration_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        load(file=file)


def test_a_file_means_what_is_written_in_it(tmp_path: Path) -> None:
    """Not what YAML 1.1 makes of it: no is false, 0123 is 83, 1:30 is 90, a date is no text."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: &model {path: 0123}\n"
        "train: {mixed_precision: no, steps: 0010, seed: !!int 7}\n"
        "journal: {enabled: off, prune: yes}\n"
        "publish: {verify: false, tolerance: ~}\n"
        "optimizer: {learning_rate: 1e-3}\n"
        "logging: {project: 2026-01-02, group: 1:30}\n"
    )
    config = load(file=file)
    assert (config.model.path, config.train.mixed_precision) == ("0123", "no")
    assert (config.train.steps, config.train.seed) == (10, 7)
    assert (config.journal.enabled, config.journal.prune, config.publish.verify) == (False, True, False)
    assert (config.optimizer.learning_rate, config.publish.tolerance) == (1e-3, None)
    assert (config.logging.project, config.logging.group) == ("2026-01-02", "1:30")


def test_a_mapping_that_others_take_over_may_be_changed_there(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {path: m, lora: &a {<<: {rank: 1}, rank: 2}}\ntrain: {<<: {steps: 3, seed: 4}, seed: 5}\n"
    )
    config = load(file=file)
    assert config.model.lora is not None
    assert (config.model.lora.rank, config.train.steps, config.train.seed) == (2, 3, 5)


def test_secrets_appear_neither_in_messages_nor_in_dumps() -> None:
    secret = "hunter2"  # noqa: S105
    config = load(*MODEL, "--publish.token", secret, "--atropos.headers", f"{{X-Key: {secret}}}")
    assert secret not in repr(config)
    assert secret not in config.model_dump_json()
    with pytest.raises(ConfigurationError) as caught:
        load("--publish.token", f"[{secret}]", "--atropos.token", f"{{a: {secret}}}")
    assert secret not in str(caught.value)
    together = ("--publish.transport", "lora", "--publish.servers", "http://a:1", "--publish.token", secret)
    with pytest.raises(ConfigurationError, match=r"model\.lora is not set") as caught:
        load(*MODEL, *together)
    assert secret not in str(caught.value)


def test_every_setting_has_a_meaning_and_is_read_somewhere() -> None:
    source = "\n".join(
        path.read_text() for path in Path("trainer").rglob("*.py") if path.parent.name != "config"
    )
    source += "\n".join(path.read_text() for path in Path("trainer/config").glob("_*.py")).replace(":", "")
    for field in config_fields():
        assert len(field.help) > 10, f"{field.name} is not explained"
        assert f".{field.name.rpartition('.')[2]}" in source, f"nobody reads {field.name}"


def test_the_configuration_cannot_be_changed_afterwards() -> None:
    config = load(*MODEL)
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 5  # type: ignore[misc]

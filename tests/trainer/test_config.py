"""The configuration: one name for a setting everywhere, and no wrong one is ever ignored."""

from __future__ import annotations

from pathlib import Path

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
        (["--trian.steps", "3"], r"trian: there is no such setting; did you mean train\?"),
        (["--nonsense.key", "3"], r"the sections are: model, atropos"),
        (["--train.completely_else", "3"], r"train has: steps, seed"),
        (["--train.steps", "many"], r"train\.steps: .*integer.*found 'many'"),
        (["--train.steps", "-1"], r"train\.steps: .*greater than or equal to 0"),
        (["--loss.name", "dpo"], r"loss\.name: .*'weighted_sft', 'policy_gradient' or 'ppo_clip'"),
        (["--atropos.url", "localhost:8000"], r"atropos\.url: .*http://"),
        (["--publish.transport", "disk"], r"publish\.servers is empty"),
        (["--data.advantage_clip", "[1, 5]"], r"around 0"),
        (["--optimizer.learning_rate", "nan"], r"optimizer\.learning_rate: .*finite"),
        (["--train.steps"], r"--train\.steps needs a value"),
        (["steps=3"], r"unexpected argument 'steps=3'"),
        (["--model", "x", "--model.path", "y"], r"'model' was given a value already"),
        (["--publish.servers", "[http://a"], r"not a valid list"),
    ],
)
def test_what_is_wrong_is_refused_by_name_with_what_is_allowed(words: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load(*MODEL, *words)


def test_all_wrong_settings_are_told_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        load("--train.steps", "x", "--loss.name", "y", "--foo.bar", "z")
    assert all(name in str(caught.value) for name in ("model.path", "train.steps", "loss.name", "foo"))


def test_unknown_environment_variables_of_ours_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="stepz"):
        load(*MODEL, ATROPOS_TRAINER_TRAIN__STEPZ="3")


def test_other_environment_variables_do_not_matter() -> None:
    assert load(*MODEL, STEPS="3", HOME="/").train.steps == 100


def test_lists_can_be_written_with_commas_or_as_yaml() -> None:
    urls = ["http://a:1", "http://b:2"]
    for text in ("http://a:1,http://b:2/", "[http://a:1, 'http://b:2']"):
        assert load(*MODEL, "--publish.servers", text).publish.servers == urls


def test_words_that_look_like_numbers_stay_words() -> None:
    config = load(*MODEL, ATROPOS_TRAINER_PUBLISH__TOKEN="0123")  # noqa: S106
    assert config.publish.token is not None
    assert config.publish.token.get_secret_value() == "0123"


@pytest.mark.parametrize("name", ["data.advantage_normalization", "publish.transport"])
def test_a_setting_whose_value_is_called_none_takes_it_from_the_command_line(name: str) -> None:
    section, field = name.split(".")
    assert getattr(getattr(load(*MODEL, f"--{name}", "none"), section), field) == "none"


def test_null_clears_a_setting(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: m, lora: {rank: 4}}\n")
    assert load(file=file).model.lora is not None
    assert load("--model.lora", "null", file=file).model.lora is None


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n- b\n", "must hold sections"), ("a: [", "not valid YAML"), ("model: 3\n", "model: ")],
)
def test_files_that_are_no_configuration_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        load(file=file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml: No such file"):
        load(file=tmp_path / "nowhere.yaml")


def test_secrets_appear_neither_in_messages_nor_in_dumps() -> None:
    secret = "hunter2"  # noqa: S105
    config = load(*MODEL, "--publish.token", secret, "--atropos.headers", f"{{X-Key: {secret}}}")
    assert secret not in repr(config)
    assert secret not in config.model_dump_json()
    with pytest.raises(ConfigurationError) as caught:
        load("--publish.token", f"[{secret}]", "--atropos.token", f"{{a: {secret}}}")
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

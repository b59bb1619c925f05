"""Resuming with other settings: each takes effect, or is refused with its value then and now."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from local_stack.models import make_tiny_model
from tests.trainer.batches import make_bodies
from tests.trainer.runs import rows, run
from trainer.config import load_config, refuse_changed_settings
from trainer.errors import ConfigurationError

ADAPTERS = "--model.lora.rank", "4", "--model.lora.alpha", "8"


@pytest.fixture(scope="module")
def finished(tiny_model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step of full fine-tuning; shared, so go on in a copy."""
    output = tmp_path_factory.mktemp("runs") / "full"
    run(tiny_model_directory, output, make_bodies(1), steps=1)
    return output


@pytest.fixture(scope="module")
def finished_adapters(tiny_model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step of training adapters; shared, so go on in a copy."""
    pytest.importorskip("peft")
    output = tmp_path_factory.mktemp("runs") / "lora"
    run(tiny_model_directory, output, make_bodies(1), *ADAPTERS, steps=1)
    return output


def go_on(model: Path, output: Path, *overrides: str) -> Any:
    return run(model, output, make_bodies(1, first_seed=1), *overrides, steps=2)


def test_what_only_decides_how_a_run_goes_on_takes_effect(
    tiny_model_directory: Path, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "moved")
    free = ("--checkpoint.keep", "7", "--atropos.url", "http://127.0.0.1:9", "--publish.every", "3")
    assert go_on(tiny_model_directory, tmp_path / "moved", *free).step == 2


def written_times(directory: Path) -> dict[Path, int]:
    """When each file was written; whoever starts writes its name into the lock."""
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.name != "lock"}


@pytest.mark.parametrize(
    ("setting", "before", "now"),
    [
        ("data.advantage_normalization", '"none"', "batch"),
        ("optimizer.learning_rate", "0.001", "0.002"),
        ("loss.name", '"policy_gradient"', "ppo_clip"),
        ("atropos.batch_size", "64", "32"),
        ("model.lora.rank", "null", "4"),
    ],
)
def test_what_changes_the_mathematics_is_refused(
    tiny_model_directory: Path, finished: Path, setting: str, before: str, now: str
) -> None:
    untouched = written_times(finished)
    with pytest.raises(ConfigurationError) as refused:
        go_on(tiny_model_directory, finished, f"--{setting}", now)
    message = str(refused.value)
    assert f"{setting}: {before} in the checkpoint, " in message
    assert now in message
    assert f"--train.resume_changes {setting}" in message or "cannot be changed" in message
    assert written_times(finished) == untouched


def test_a_named_setting_may_change_and_the_log_says_it(
    tiny_model_directory: Path, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    changed = ("--optimizer.learning_rate", "2e-3", "--train.resume_changes", "optimizer.*")
    go_on(tiny_model_directory, tmp_path / "copy", *changed)
    assert rows(tmp_path / "copy")[-1]["learning_rate"] == 2e-3
    (warning,) = [record for record in caplog.records if "another setting" in record.message]
    assert warning.levelno == logging.WARNING
    assert "optimizer.learning_rate: 0.001 in the checkpoint, 0.002 now" in warning.message


def test_another_model_in_the_same_output_directory_is_refused(finished: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(ConfigurationError, match=rf"model\.path: .*tiny.* in the checkpoint, .*{other}"):
        go_on(other, finished)


@pytest.mark.parametrize(
    "changed",
    [
        ("--model.lora.rank", "8"),
        ("--model.lora.alpha", "16"),
        ("--model.lora.dropout", "0.1"),
        ("--model.lora.target_modules", '["q_proj"]'),
    ],
)
def test_adapters_of_another_shape_are_refused_whatever_is_named(
    tiny_model_directory: Path, finished_adapters: Path, changed: tuple[str, str]
) -> None:
    with pytest.raises(ConfigurationError, match=r"lora\.\w+: .* in the checkpoint, .*cannot be changed"):
        go_on(
            tiny_model_directory,
            finished_adapters,
            *(*ADAPTERS, *changed, "--train.resume_changes", changed[0][2:]),
        )


def test_a_base_that_was_moved_may_be_named_if_it_holds_the_same_weights(
    tiny_model_directory: Path, finished_adapters: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished_adapters, tmp_path / "run")
    shutil.copytree(tiny_model_directory, tmp_path / "moved")
    named = (*ADAPTERS, "--train.resume_changes", "model.path")
    other = make_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(ConfigurationError, match="were trained on other base weights"):
        go_on(other, tmp_path / "run", *named)
    assert go_on(tmp_path / "moved", tmp_path / "run", *named).step == 2


def test_options_of_an_estimator_are_compared_also_with_a_checkpoint_from_before_they_came() -> None:
    before, now = (
        load_config(None, ["--model.path", "m", "--data.advantage_options.std", std], environment={})
        for std in ("n", "n-1")
    )
    stored = before.model_dump(mode="json")
    refuse_changed_settings(stored, before, checkpoint="step-1")
    with pytest.raises(ConfigurationError, match=r'advantage_options: {"std": "n"} in the checkpoint'):
        refuse_changed_settings(stored, now, checkpoint="step-1")
    stored["data"]["advantage_options"] = {}
    refuse_changed_settings(stored, before, checkpoint="step-1")
    with pytest.raises(ConfigurationError, match=r'advantage_options: {"std": "n"} in the checkpoint'):
        refuse_changed_settings(stored, now, checkpoint="step-1")

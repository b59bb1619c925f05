"""`atropos-train` as a user meets it, in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.forked import run_module
from trainer.config import config_fields, option_fields


def atropos_train(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_module("trainer.cli", *words, environment=os.environ | environment)


def test_help_names_every_command_and_loads_without_a_warning() -> None:
    command = [sys.executable, "-W", "error", "-m", "trainer.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("run", "check", "local"))


def test_help_of_run_explains_every_setting_and_loads_no_torch() -> None:
    program = "import atexit, sys; from trainer.cli import main; "
    program += "atexit.register(lambda: print('torch loaded:', 'torch' in sys.modules)); main()"
    command = [sys.executable, "-c", program, "run", "--help", "--loss.name", "ppo_clip"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0
    assert "torch loaded: False" in done.stdout
    for field in (*config_fields(), *option_fields()):
        assert f"--{field.name} " in done.stdout
        assert field.help in done.stdout


def test_a_wrong_key_in_the_environment_is_refused() -> None:
    done = atropos_train("run", "--model.path", "m", ATROPOS_TRAINER_LOSS__NAEM="ppo_clip")
    assert done.returncode == 2
    assert "loss.naem" in done.stderr


def test_an_api_that_is_not_there_is_named_and_a_checkpoint_stays(
    tiny_model_directory: Path, tmp_path: Path, free_port: int
) -> None:
    done = atropos_train(
        "run",
        *("--model.path", str(tiny_model_directory)),
        *("--train.output_dir", str(tmp_path / "run")),
        *("--atropos.url", f"http://127.0.0.1:{free_port}"),
        *("--atropos.ready_timeout", "2"),
    )
    assert done.returncode == 1
    assert f"127.0.0.1:{free_port}" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run/checkpoints/step-000000/state.json").is_file()

"""vLLM as the demonstration's inference server, as far as it can be tried without one."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from local_stack.commands import SERVED_MODEL_NAME, VLLM_PLUGINS, Address, vllm_command, vllm_environment
from local_stack.errors import EngineMissingError
from local_stack.launcher import LocalOptions, run_local
from local_stack.vllm import require_vllm, starting_part

DEMO_CONFIG = Path(__file__).parents[2] / "local_stack" / "demo.yaml"


def value_of(flag: str, command: list[str]) -> str:
    return command[command.index(flag) + 1]


def test_a_python_that_is_not_there_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(EngineMissingError, match=r"No such file.*make vllm.*--vllm-python"):
        require_vllm(tmp_path / "bin" / "python")


def test_a_python_without_vllm_is_refused_with_advice() -> None:
    with pytest.raises(EngineMissingError, match=r"has no package vllm.*make vllm"):
        require_vllm(Path(sys.executable))


def test_a_python_with_vllm_is_accepted(tmp_path: Path) -> None:
    python = tmp_path / "python"
    (tmp_path / "vllm").mkdir()
    python.write_text(f'#!/bin/sh\nshift; cd {tmp_path}; exec {sys.executable} "$@"\n')  # without -I
    python.chmod(0o755)
    require_vllm(python)


def test_a_missing_engine_ends_the_command_before_anything_is_made(tmp_path: Path) -> None:
    options = LocalOptions(
        model="tiny",
        steps=1,
        seed=0,
        run_dir=tmp_path / "run",
        config=DEMO_CONFIG,
        engine="vllm",
        vllm_python=tmp_path / "python",
    )
    console = Console(file=io.StringIO(), width=300)
    assert run_local(options, console) == 1
    assert isinstance(console.file, io.StringIO)
    assert "make vllm" in console.file.getvalue()
    assert list(tmp_path.iterdir()) == []


def test_the_server_listens_on_loopback_and_serves_the_name_that_environments_ask_for() -> None:
    command = vllm_command(Address(port=9001), model="/models/m", seed=3, python="/venv/bin/python")
    assert command[:3] == ["/venv/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    assert value_of("--host", command) == "127.0.0.1"
    assert value_of("--port", command) == "9001"
    assert value_of("--served-model-name", command) == SERVED_MODEL_NAME
    assert value_of("--seed", command) == "3"
    assert "--enable-lora" not in command


def test_adapters_are_taken_where_asked_for() -> None:
    command = vllm_command(Address(port=9001), model="m", seed=0, python="python", lora_rank=8)
    assert "--enable-lora" in command
    assert value_of("--max-lora-rank", command) == "8"


@pytest.mark.parametrize("flag", ["--middleware", "--worker-cls"])
def test_our_plugins_are_where_the_environment_variables_say(
    flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = vllm_command(Address(port=1), model="m", seed=0, python="p")
    module, _, name = value_of(flag, command).partition(".")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert vllm_environment()["PYTHONPATH"] == str(VLLM_PLUGINS)
    assert f"class {name}" in (VLLM_PLUGINS / f"{module}.py").read_text()
    monkeypatch.setenv("PYTHONPATH", "/mine")
    assert vllm_environment()["PYTHONPATH"] == f"{VLLM_PLUGINS}:/mine"


def test_what_vllm_does_while_it_starts_is_read_from_its_log(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    assert starting_part(log) == "importing its libraries"
    told = []
    for line in (
        "INFO [api_utils.py:286] non-default args: {'host': '127.0.0.1'}",
        "INFO [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: model='m'",
        "INFO [cpu_model_runner.py:68] Starting to load model m...",
        "INFO [default_loader.py:501] Loading weights took 0.94 seconds",
        "INFO [entry.py:140] Starting vLLM server on http://127.0.0.1:8151",
    ):
        with log.open("a") as file:
            file.write(f"(EngineCore pid=1) {line}\n")
        told.append(starting_part(log))
    assert told == [
        "reading the model's configuration",
        "starting its engine",
        "loading the model",
        "making its cache",
        "opening its port",
    ]

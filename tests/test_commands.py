"""The commands of the pages: the cheap ones are run, the words of the long ones are read, the rest is named.

A command is a line of a `bash` block, or one after `$ `. What needs a server, a GPU or hours is in
`ELSEWHERE`, with the test that starts it.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from atropos_client.journal import Journal
from tests.test_documentation import PAGES, ROOT
from tests.trainer.batches import make_bodies
from tests.trainer.runs import run
from trainer.cli import main
from trainer.config import load_config

ELSEWHERE = {
    "pip install -c constraints.txt -e .": "Makefile",
    "run-api": "tests/atropos_client/test_client.py",
    "python my_environment.py serve": "tests/environments/test_four.py",
    "vllm serve": "tests/vllm/launching.py",
    ".venv-vllm/bin/python -m vllm.entrypoints.openai.api_server": "tests/vllm/launching.py",
    "python -m sglang.launch_server": "docs/engines/sglang.md",  # which says that it was not run
    "accelerate launch": "tests/trainer/test_multiprocess.py",
    "sbatch": "tests/test_deploy.py",
    "kubectl": "tests/test_deploy.py",
    "docker-compose": "tests/docker",
    "docker cp": "tests/docker",
    "curl http://127.0.0.1:9100/health": "tests/trainer/test_watch_runs.py",
    "atropos-train check --publish": "tests/trainer/test_check.py",
    "export PYTHONPATH=": "tests/vllm/launching.py",
    "pip install --no-deps -e . &&": "Makefile",
    "python -m verl_integration.main": "docs/verl.md",  # which says what of it was run
    "unshare --map-root-user --net": "Makefile",
    "atropos-train view runs/": "tests/view/test_site.py",  # it serves until Ctrl-C
}
"""What is not run here, by how it begins, and where it is."""

FOLDERS = {"DIR", "runs/default", "runs/first", "runs/monday"}
"""What pages call the directory of a run."""


def commands_of(page: Path) -> Iterator[str]:
    """Yield the commands of a page, without comments and variables before them, each on one line."""
    for kind, text in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in text.replace("\\\n", " ").splitlines():
            command = line if kind == "bash" else line[2:] if line.startswith("$ ") else ""
            command = re.sub(r"(^|\s+)#.*", "", command).strip()
            command = re.sub(r"^([A-Z_]+=\S+ +)+", "", command)
            if command:
                yield " ".join(command.split())


COMMANDS = sorted({command for page in PAGES for command in commands_of(page)})
OURS = [command for command in COMMANDS if not command.startswith(tuple(ELSEWHERE))]


def select(*beginnings: str) -> list[str]:
    return [command for command in OURS if command.startswith(beginnings)]


TRAINING = select("atropos-train run ", "torchrun ")
SHOWING = select("atropos-train journal ", "atropos-train checkpoint ", "atropos-train report ")
SHOWING += select("atropos-train view --terminal ")
BENCHMARKS = select("python -m benchmarks.")
MAKE = select("make ")
OTHERS = select("atropos-train check ", "atropos-train replay ")


def test_each_command_is_run_here_or_named_with_where_it_is() -> None:
    assert sorted([*TRAINING, *SHOWING, *BENCHMARKS, *MAKE, *OTHERS]) == OURS
    assert len(OURS) > 20
    for beginning, where in ELSEWHERE.items():
        assert any(command.startswith(beginning) for command in COMMANDS), f"no page has {beginning}"
        assert (ROOT / where).exists(), where


@pytest.fixture(scope="module")
def directory(tiny_model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for the commands of this module, which may change it."""
    return fill(tmp_path_factory.mktemp("commands"), tiny_model_directory)


def fill(root: Path, tiny_model_directory: Path) -> Path:
    """Make a run with checkpoints and a journal of two batches, and a configuration beside it."""
    run(tiny_model_directory, root / "run", make_bodies(2), steps=2)
    with Journal.open(root / "run/journal") as journal:
        for version, body in enumerate(make_bodies(2)):
            journal.append(body, served_version=version)
        journal.settle(1, "trained", step=1)
    settings = {
        "model": {"path": str(tiny_model_directory)},
        "train": {"device": "cpu", "mixed_precision": "no"},
        "atropos": {"url": "http://127.0.0.1:9"},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(settings))
    return root


def words_of(command: str, directory: Path) -> list[str]:
    """The words of a command for this directory."""
    known = {folder: str(directory / "run") for folder in FOLDERS}
    known |= {"run.yaml": str(directory / "run.yaml"), "FILE": str(directory / "run.yaml")}
    known |= {"runs/again": str(directory / "again"), "17": "2", "18": "1"}  # 17 waits
    return [known.get(word, word) for word in shlex.split(command.partition(" > ")[0])]


@pytest.mark.parametrize("command", TRAINING)
def test_the_settings_of_commands_that_train_are_accepted(
    command: str,
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = words_of(command, directory)
    if "--help" in words:
        modules = dict(
            re.findall(r"```python\n# (\w+\.py)\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.S)
        )
        for name, text in modules.items():
            (tmp_path / name).write_text(text)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit, match="0"):
            main(words[1:])
        assert "--loss.epsilon" in capsys.readouterr().out
        return
    settings = words[words.index("run") + 1 :] if "run" in words else words
    config = directory / "run.yaml" if "--config" in settings else None
    if config is None:
        settings = ["--config", "", "--model.path", "m", *settings]
    at = settings.index("--config")
    load_config(config, settings[:at] + settings[at + 2 :], environment={})


@pytest.mark.parametrize("command", SHOWING)
def test_commands_that_show_a_run_do(
    command: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words_of(command, directory)[1:]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", BENCHMARKS)
def test_benchmarks_take_the_words_that_pages_give_them(command: str) -> None:
    words = shlex.split(command)
    module = importlib.import_module(
        words[2] if words[2] != "benchmarks.step" else "benchmarks.step.__main__"
    )
    parser: argparse.ArgumentParser = module._parser()
    parser.parse_args(words[3:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_make_is_told_and_modules_that_are_run_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text()
    named = [*re.findall(r"`(?:\w+=\d+ )?make ([a-z0-9-]+)", text), *(each.split()[1] for each in MAKE)]
    assert set(named) <= targets
    for module in re.findall(r"python -m ((?:benchmarks|trainer|tests)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_a_check_says_what_is_missing_and_a_replay_trains(
    tiny_model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Its own directory: a command of another test lets go of a batch that is replayed here.
    directory = fill(tmp_path, tiny_model_directory)
    for command in select("atropos-train check "):
        assert main(words_of(command, directory)[1:]) == 1  # there is no API
        assert "http://127.0.0.1:9" in capsys.readouterr().out
    (replay,) = {tuple(words_of(command, directory)[1:]) for command in select("atropos-train replay ")}
    assert main(replay) == 0
    assert "Done after 2 optimizer steps: the model is" in capsys.readouterr().err
    assert (directory / "again/final/model.safetensors").is_file()

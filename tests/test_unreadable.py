"""Whatever may not be read: the message names it and says that it is permission, whoever tries to read it."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from atropos_client.journal import Journal
from atropos_client.readable import require_readable
from local_stack.environment import main as environment
from local_stack.inference.__main__ import main as serve
from local_stack.inference.errors import CheckpointMismatch
from local_stack.inference.weights import read_checkpoint
from local_stack.models import make_tiny_model
from tests.ordinary_user import ordinary_user
from tests.trainer.batches import make_body
from trainer.cli import main

STEP = "base/checkpoints/step-000001"


@dataclass(frozen=True)
class Place:
    """A directory with everything that a command can be asked to read."""

    root: Path

    def replay(self, *more: str) -> list[str]:
        return ["replay", "--replay.from", str(self.root / "data/groups.jsonl"), *self._settings(), *more]

    def resume(self) -> list[str]:
        return self.replay("--train.output_dir", str(self.root / "base"), "--train.steps", "2")

    def run(self) -> list[str]:
        return ["run", *self._settings(), "--train.output_dir", str(self.root / "other")]

    def path(self, name: str) -> str:
        return str(self.root / name)

    def _settings(self) -> list[str]:
        return [
            *("--model.path", str(self.root / "models/tiny"), "--loss.name", "policy_gradient"),
            *("--train.device", "cpu", "--train.mixed_precision", "no", "--checkpoint.every", "1"),
            *("--atropos.url", "http://127.0.0.1:9"),
        ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("place")
    make_tiny_model(root / "models" / "tiny")
    (root / "config").mkdir()
    (root / "config" / "run.yaml").write_text("train: {}\n")
    (root / "data").mkdir()
    groups = json.loads(make_body(1))["batch"]
    (root / "data" / "groups.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups))
    made = Place(root)
    assert main(made.replay("--train.output_dir", made.path("base"), "--train.steps", "1")) == 0
    with Journal.open(root / "open" / "journal") as journal:  # as long as it is open, its log lies beside it
        journal.append(make_body(1))
        yield made


@contextlib.contextmanager
def forbidden(path: Path) -> Iterator[None]:
    before = path.stat().st_mode
    path.chmod(0)
    try:
        with ordinary_user():
            yield
    finally:
        path.chmod(before)


@pytest.mark.parametrize(
    ("unreadable", "command"),
    [
        ("models/tiny/model.safetensors", Place.run),
        ("models/tiny/config.json", Place.run),
        ("models/tiny/tokenizer.json", Place.run),
        ("models/tiny/generation_config.json", Place.run),
        ("models/tiny", Place.run),
        ("models", Place.run),
        ("models/tiny/tokenizer.json", lambda it: ["check", *it.run()[1:]]),
        ("models/tiny/model.safetensors", lambda it: ["check", *it.run()[1:]]),
        ("config/run.yaml", lambda it: [*it.run(), "--config", it.path("config/run.yaml")]),
        ("config", lambda it: [*it.run(), "--config", it.path("config/run.yaml")]),
        ("data/groups.jsonl", Place.replay),
        ("data", Place.replay),
        (f"{STEP}/manifest.json", Place.resume),
        (f"{STEP}/state.json", Place.resume),
        (f"{STEP}/optimizer.safetensors", Place.resume),
        (f"{STEP}/model/model.safetensors", Place.resume),
        (STEP, Place.resume),
        ("base/checkpoints", Place.resume),
        ("base/metrics.jsonl", Place.resume),
        (f"{STEP}/manifest.json", lambda it: ["checkpoint", "list", it.path("base")]),
        ("base/checkpoints", lambda it: ["checkpoint", "verify", it.path("base")]),
        ("open/journal/journal.sqlite3", lambda it: ["journal", "list", it.path("open/journal")]),
        ("open/journal/journal.sqlite3-wal", lambda it: ["journal", "list", it.path("open/journal")]),
        ("open/journal", lambda it: ["journal", "verify", it.path("open/journal")]),
        (
            "open/journal/journal.sqlite3",
            lambda it: ["replay", "--replay.from", it.path("open"), *it.run()[1:]],
        ),
    ],
)
def test_a_command_says_what_it_may_not_read(
    place: Place,
    unreadable: str,
    command: Callable[[Place], list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with forbidden(place.root / unreadable):
        status = main(command(place))
    shutil.rmtree(place.root / "other", ignore_errors=True)
    output = "".join("".join(capsys.readouterr()).split())  # log lines are wrapped
    assert status in (1, 2)
    assert "permissiondenied" in output.lower()
    assert str(place.root / unreadable) in output
    assert "nosuchfile" not in output.lower()
    assert "Traceback" not in output


@pytest.mark.parametrize("unreadable", ["model.safetensors", "tokenizer.json", "."])
def test_the_embedded_server_says_what_it_may_not_read(
    place: Place, unreadable: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = place.root / "models/tiny"
    with forbidden(model / unreadable):
        assert serve(["--model", str(model), "--port", "1"]) == 1
        with pytest.raises(CheckpointMismatch, match="Permission denied"):
            read_checkpoint(model)
    assert "Permission denied" in caplog.text
    assert str(model / unreadable) in caplog.text


def test_the_environment_says_what_it_may_not_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    model = place.root / "models/tiny"
    words = ["serve", "--env.tokenizer_name", str(model), "--openai.tokenizer_name", str(model)]
    monkeypatch.setattr(sys, "argv", ["environment", *words])
    with forbidden(model / "tokenizer.json"), pytest.raises(SystemExit) as ended:
        environment()
    assert "Permission denied" in str(ended.value)
    assert "tokenizer.json" in str(ended.value)


def test_what_does_not_exist_is_left_to_the_caller_and_what_is_hidden_to_nobody(place: Place) -> None:
    model = place.root / "models/tiny"
    hidden = model / ".cache"
    hidden.touch(mode=0)
    with ordinary_user():
        require_readable(model)
        require_readable("organization/model")
        require_readable(place.root / "missing/model")
    hidden.unlink()

"""A run directory belongs to one run, and a start that cannot be changes nothing in it; nor does `check`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from atropos_client import AtroposClientError, JournalLocked
from atropos_client.journal import Journal
from tests.trainer.batches import make_bodies
from tests.trainer.runs import run
from trainer.cli import main
from trainer.config import load_config
from trainer.errors import TrainerError
from trainer.run.processes import join_run
from trainer.run.start import accept_journal, find_checkpoint, look_at_start


def everything_in(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(directory)): (
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in sorted(directory.rglob("*"))
    }


def test_a_second_start_of_any_kind_beside_a_live_run_changes_nothing(
    tiny_model_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    run(tiny_model_directory, output, make_bodies(2), steps=2)
    partial = output / "checkpoints/.step-000003.partial-abc"  # as the live run may be writing one
    partial.mkdir()
    (partial / "state.json").write_text("{}")
    monkeypatch.setattr("trainer.run.processes._LOCK_PATIENCE_SECONDS", 0.0)
    words = ["--model.path", str(tiny_model_directory), "--train.output_dir", str(output)]
    words += ["--train.device", "cpu", "--train.mixed_precision", "no", "--train.steps", "4"]
    words += ["--journal.shutdown_timeout", "0.1"]
    recording = tmp_path / "export.jsonl"
    recording.write_text(json.dumps({"reply": json.loads(make_bodies(1)[0])}) + "\n")
    lock = Journal.take_lock(output / "journal")
    config = load_config(None, words, environment={})
    with pytest.raises(JournalLocked, match=f"is being written by process {os.getpid()} on "):
        look_at_start(config)
    before = everything_in(output)
    for start in (
        ["run", *words],
        ["run", *words, "--journal.enabled", "false"],
        ["replay", *words, "--replay.from", str(recording)],
    ):
        assert main(start) == 1, start
        said = " ".join(capsys.readouterr().err.split())
        assert f"is being written by process {os.getpid()} on " in said
        assert everything_in(output) == before
    lock.release()


def replace_by_file(path: Path) -> None:
    shutil.rmtree(path)
    path.touch()


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def cut_journal(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(20_000)


@pytest.fixture(scope="module")
def ended_run(tiny_model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps whose journal was pruned."""
    output = tmp_path_factory.mktemp("ended") / "run"
    run(tiny_model_directory, output, make_bodies(2), steps=2)
    with Journal.open(output / "journal") as journal:
        for number, body in enumerate(make_bodies(2), start=1):
            journal.append(body)
            journal.settle(number, "trained", step=number)
        journal.prune(2)
    return output


@pytest.mark.parametrize(
    ("what", "damage", "why"),
    [
        ("checkpoints", shutil.rmtree, "no body of batch 1 any more.*Put back the checkpoints"),
        ("checkpoints", replace_by_file, "checkpoints is in the way: it is no directory"),
        ("set_aside", lambda path: path.touch(), "set_aside is in the way: it is no directory"),
        ("final", replace_by_file, "final is in the way: it is no directory"),
        ("metrics.jsonl", replace_by_directory, "metrics.jsonl is in the way: it is a directory"),
        ("journal/journal.sqlite3", cut_journal, "is damaged"),
        ("journal/journal.sqlite3", Path.unlink, "lacks the last .* writes"),
        ("journal", shutil.rmtree, "counts 2 batches but the journal .* is new or emptied"),
        ("checkpoints/step-000002/manifest.json", Path.unlink, "no checkpoint in .* is whole"),
    ],
)
def test_a_start_that_cannot_be_changes_nothing_and_check_refuses_it_for_the_same_reason(
    what: str,
    damage: Callable[[Path], object],
    why: str,
    ended_run: Path,
    tiny_model_directory: Path,
    tmp_path: Path,
) -> None:
    output = shutil.copytree(ended_run, tmp_path / "run")
    shutil.rmtree(output / "checkpoints/step-000000", ignore_errors=True)
    damage(output / what)
    words = ["--model.path", str(tiny_model_directory), "--train.output_dir", str(output)]
    words += ["--train.device", "cpu", "--train.mixed_precision", "no"]
    words += ["--optimizer.learning_rate", "1e-3", "--loss.name", "policy_gradient"]
    config = load_config(None, words, environment={})
    kept = {"metrics.jsonl", "checkpoints", "final", "set_aside"}
    before = {name: found for name, found in everything_in(output).items() if name.split("/")[0] in kept}
    for start in (
        look_at_start,
        lambda config: find_checkpoint(config, join_run(config).accelerator, accept_journal),
    ):
        with pytest.raises((TrainerError, AtroposClientError), match=why):
            start(config)
    after = {name: found for name, found in everything_in(output).items() if name.split("/")[0] in kept}
    assert after == before


def test_what_a_killed_writer_left_of_the_finished_model_is_removed_or_put_back(
    ended_run: Path, tiny_model_directory: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(ended_run, tmp_path / "run")
    (output / "final").rename(output / ".final.retired-7")
    (output / ".final.deleted-8").mkdir()
    run(tiny_model_directory, output, (), steps=2)
    assert (output / "final/config.json").exists()
    assert not list(output.glob(".final.*"))

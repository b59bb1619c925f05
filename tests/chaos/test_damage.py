"""A byte that changes, or a file that is cut off, anywhere in what a killed run has left.

The next start ends as if nothing had happened, or with one clear line and an exit code; never with a
traceback, never with other weights. `CHAOS_SEED` chooses other damages.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from atropos_client.journal import WriterLock
from tests.chaos.killed_run import BATCHES
from tests.forked import run_module
from tests.ports import free_port
from trainer.cli import main

SEED = int(os.environ.get("CHAOS_SEED", "0"))
DATABASE = ("journal/journal.sqlite3", "journal/journal.sqlite3-wal")


@dataclass(frozen=True)
class Damage:
    """What happens to one file."""

    name: str
    kind: str
    position: int
    bit: int

    @classmethod
    def draw(cls, name: str, size: int, generator: random.Random) -> Damage:
        """Choose one; half of them cut the file off."""
        kind = generator.choice(["flip", "cut"])
        return cls(name, kind, generator.randrange(max(1, size)), generator.randrange(8))

    def apply(self, root: Path) -> None:
        """Do it."""
        path = root / self.name
        content = bytearray(path.read_bytes())
        if self.kind == "cut":
            del content[self.position :]
        elif content:
            content[self.position] ^= 1 << self.bit
        path.write_bytes(content)


@dataclass(frozen=True)
class KilledRun:
    """What a killed run has left, and how to go on with it."""

    directory: Path
    words: list[str]

    def go_on(self, output: Path) -> int:
        """Start again in a copy; returns the exit code."""
        return main(["run", *self.words, "--train.output_dir", str(output)])


@pytest.fixture(scope="module")
def killed_run(tiny_model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> KilledRun:
    directory = tmp_path_factory.mktemp("killed") / "run"
    words = [
        *("--model.path", str(tiny_model_directory), "--atropos.url", f"http://127.0.0.1:{free_port()}"),
        *("--atropos.batch_timeout", "5", "--atropos.ready_timeout", "1", "--journal.shutdown_timeout", "5"),
        *("--atropos.batch_size", "12", "--atropos.max_token_length", "64"),
        *("--train.steps", str(BATCHES), "--train.device", "cpu", "--train.mixed_precision", "no"),
        *("--train.mismatch_alarm", "null", "--checkpoint.every", "2", "--publish.transport", "none"),
        *("--logging.progress", "false", "--optimizer.learning_rate", "1e-3"),
    ]
    words_there = [directory, *words, "--train.output_dir", directory]
    done = run_module("tests.chaos.killed_run", *words_there)
    assert done.returncode == -9, done.stderr[-3000:]
    WriterLock.acquire(directory / "journal/lock", wait=60).release()  # its fetching process is gone
    return KilledRun(directory, words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "count",
    [
        pytest.param(12, id="12 damages", marks=pytest.mark.timeout(600)),
        pytest.param(200, id="200 damages", marks=[pytest.mark.chaos, pytest.mark.timeout(3600)]),
    ],
)
def test_whatever_is_damaged_the_next_start_ends_the_same_or_says_what_is_wrong(
    count: int, killed_run: KilledRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert killed_run.go_on(shutil.copytree(killed_run.directory, tmp_path / "whole")) == 0
    capfd.readouterr()
    expected = (tmp_path / "whole/final/model.safetensors").read_bytes()
    names = sorted(
        path.relative_to(killed_run.directory).as_posix()
        for path in killed_run.directory.rglob("*")
        if path.is_file() and path.stat().st_size
    )
    assert {*DATABASE, "journal/journal.marks", "metrics.jsonl", "set_aside/groups.jsonl"} <= set(names)
    generator = random.Random(SEED)
    # Half of them in the database and its log, the rest in all other files in turn.
    others = [name for name in names if name not in DATABASE]
    generator.shuffle(others)
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    for number in range(count):
        name = DATABASE[number // 2 % 2] if number % 2 else others[number // 2 % len(others)]
        copy = shutil.copytree(killed_run.directory, tmp_path / "copy")
        damage = Damage.draw(name, (copy / name).stat().st_size, generator)
        damage.apply(copy)
        try:
            code = killed_run.go_on(copy)
        except BaseException as error:  # noqa: BLE001 - of whatever kind: it would be a traceback
            code = None
            wrong.append(f"{damage}: raised {error!r}")
        said = capfd.readouterr().err
        final = copy / "final/model.safetensors"
        errors = [
            line for line in said.splitlines() if " ERROR " in line or line.startswith("atropos-train ")
        ]
        if "Traceback" in said:
            wrong.append(f"{damage}: a traceback:\n{said[-2000:]}")
        elif code == 0 and (not final.exists() or final.read_bytes() != expected):
            wrong.append(f"{damage}: other weights:\n{said[-2000:]}")
        elif code not in (0, None) and not any("failed" in line for line in errors):
            wrong.append(f"{damage}: exit code {code} and no line:\n{said[-2000:]}")
        outcomes["the same" if code == 0 else "refused"] += 1
        shutil.rmtree(copy)
    with capfd.disabled():
        print(f"\n{count} damages, seed {SEED}: {dict(outcomes)}, {len(wrong)} wrong")  # noqa: T201 - figures
    assert wrong == []

"""Processes that are killed while they write checkpoints, and what is found afterwards; run by its tests.

`python -m tests.trainer.checkpoint_crashes MODEL DIRECTORY SCENARIO`. A fresh child is forked for every
moment and kills itself at its n-th file system call (or is killed after a random time). Every checkpoint
bears one number in all of its files, so that a mixture would show. One line a child: the moment, its exit
status, the number found afterwards.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from trainer.checkpoint import (
    Checkpoint,
    RunState,
    numpy_random_state,
    python_random_state,
    trained_parameter_names,
    write_checkpoint,
)
from trainer.checkpoint_store import (
    checkpoint_path,
    newest_whole_checkpoint,
    prune_checkpoints,
    recover_checkpoints,
)

EVENTS = (
    *("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "os.listdir", "os.scandir", "os.chmod"),
    *("os.truncate", "tempfile.mkdtemp", "shutil.rmtree"),
)


class Writer:
    """Writes checkpoints of one tiny model."""

    def __init__(self, model_directory: Path, directory: Path) -> None:
        self.directory = directory
        self._model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
        self._tokenizer = AutoTokenizer.from_pretrained(model_directory)
        self._optimizer = torch.optim.AdamW(self._model.parameters())
        for parameter in self._model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()

    def write(self, step: int, number: int) -> None:
        """Write the checkpoint of `step` with `number` everywhere."""
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.fill_(number)
            for moments in self._optimizer.state.values():
                moments["exp_avg"].fill_(number)
        write_checkpoint(
            checkpoint_path(self.directory, step),
            model=self._model,
            tokenizer=self._tokenizer,
            optimizer=self._optimizer,
            random_states={"cpu": torch.full((1, 16), number)},
            state=self._state(step, number),
            configuration={"number": number},
            versions={},
        )

    def _state(self, step: int, number: int) -> RunState:
        return RunState(
            step=step,
            policy_version=step,
            batches=number,
            counters={},
            normalizer={},
            stored_dtype="float32",
            parameter_names=trained_parameter_names(self._model),
            python_random=python_random_state(),
            numpy_random=numpy_random_state(),
        )


def number_in(checkpoint: Checkpoint) -> int:
    """The number that a checkpoint bears.

    Raises:
        AssertionError: It bears several.
    """
    assert checkpoint.manifest is not None
    found = {checkpoint.state.batches, checkpoint.manifest.configuration["number"]}
    for tensor in load_file(checkpoint.model_path / "model.safetensors").values():
        found |= set(tensor.unique().tolist())
    for name, tensor in load_file(checkpoint.path / "optimizer.safetensors").items():
        if name.endswith("/exp_avg"):
            found |= set(tensor.unique().tolist())
    found |= set(load_file(checkpoint.path / "random.safetensors")["cpu"].unique().tolist())
    assert len(found) == 1, f"{checkpoint.path} is a mixture of {found}"
    return int(found.pop())


def kill_at(moment: int, directory: Path) -> None:
    """Have this process kill itself at its n-th file system call below a directory, or flush to the disk."""
    seen = 0

    def count(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        # Files of a tree that is deleted are named relative to a descriptor.
        if event in ("os.remove", "os.rmdir") or (event in EVENTS and str(directory) in str(arguments)):
            count()

    sys.addaudithook(hook)
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        count()
        flush(descriptor)
        count()

    os.fsync = fsync  # type: ignore[assignment]


def act(writer: Writer, scenario: str) -> None:
    """What a child does. Before it there is the checkpoint of step 1, bearing 1."""
    if scenario == "next":
        writer.write(2, 2)
        prune_checkpoints(writer.directory, keep=1)
    elif scenario == "replace":
        writer.write(1, 2)
    elif scenario == "recover":
        recover_checkpoints(writer.directory)
        newest_whole_checkpoint(writer.directory)
        writer.write(2, 2)


def look(directory: Path) -> int:
    """What the next start finds."""
    recover_checkpoints(directory)
    checkpoint = newest_whole_checkpoint(directory)
    left = [path.name for path in directory.iterdir() if not path.name.startswith("step-")]
    assert left == [], left
    assert checkpoint is not None, "there is no checkpoint any more"
    return number_in(checkpoint)


def killed_at_every_call(writer: Writer, scenario: str, before: Path) -> None:
    """One child a moment, until one lives to its end."""
    for moment in range(1, 1000, 1 if scenario == "next" else 2):
        shutil.rmtree(writer.directory, ignore_errors=True)
        shutil.copytree(before, writer.directory)
        child = os.fork()
        if child == 0:
            kill_at(moment, writer.directory)
            act(writer, scenario)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{moment} {status} {look(writer.directory)}\n")
        if status == 0:
            return


def killed_at_random(writer: Writer, children: int) -> None:
    """Children write and prune in a loop; each goes on from what the one before left."""
    generator = random.Random(0)
    started = time.monotonic()
    writer.write(1, 1)
    usual = time.monotonic() - started
    for moment in range(children):
        first = look(writer.directory)
        child = os.fork()
        if child == 0:
            for number in range(first + 1, first + 10_000):
                writer.write(number // 2, number)  # every second one replaces the one before
                prune_checkpoints(writer.directory, keep=1)
            os._exit(1)
        time.sleep(generator.uniform(0.001, 4 * usual))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        found = look(writer.directory)
        assert found >= first, f"{found} after {first}"
        sys.stdout.write(f"{moment} {status} {found}\n")


def main(model: Path, root: Path, scenario: str) -> None:
    """Run a scenario."""
    torch.set_num_threads(1)
    disable_progress_bar()
    writer = Writer(model, root / "checkpoints")
    writer.write(1, 1)
    if scenario == "random":
        killed_at_random(writer, children=40)
        return
    if scenario == "recover":  # as a writer leaves it that dies between its two renames
        path = checkpoint_path(writer.directory, 1)
        path.rename(path.with_name(f".{path.name}.retired-1"))
        shutil.copytree(path.with_name(f".{path.name}.retired-1"), path.with_name(f".{path.name}.partial-x"))
        shutil.copytree(path.with_name(f".{path.name}.retired-1"), path.with_name(".step-000000.deleted-1"))
    before = root / "before"
    writer.directory.rename(before)
    killed_at_every_call(writer, scenario, before)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])

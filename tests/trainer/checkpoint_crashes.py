"""Processes that are killed while they write checkpoints, and what is found afterwards; run by its tests.

`python -m tests.trainer.checkpoint_crashes MODEL DIRECTORY SCENARIO`. A fresh child is forked for every
moment and kills itself at its n-th file system call. Every checkpoint bears one number in all of its files,
so that a mixture would show. One line a child: the moment, its exit status, the number found afterwards.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from tests.trainer import directory_crashes
from tests.trainer.batches import make_bodies
from tests.trainer.directory_crashes import kill_at
from tests.trainer.runs import run
from trainer.checkpoints.format import (
    Checkpoint,
    CheckpointState,
    trained_parameter_names,
    verify_checkpoint,
    write_checkpoint,
)
from trainer.checkpoints.retention import (
    checkpoint_path,
    find_newest_whole,
    prune_checkpoints,
    recover_checkpoints,
)
from trainer.errors import CheckpointError, MetricsError
from trainer.model.base_checkpoint import read_base

EVENTS = (*directory_crashes.EVENTS, "os.truncate", "tempfile.mkdtemp", "shutil.rmtree")


class Writer:
    """Writes checkpoints of one tiny model."""

    def __init__(self, model_directory: Path, directory: Path) -> None:
        self.directory = directory
        self._model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
        self._base = read_base(str(model_directory))
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
            base=self._base,
            optimizer=self._optimizer,
            state=self._state(step, number),
            configuration={"number": number},
            versions={},
        )

    def _state(self, step: int, number: int) -> CheckpointState:
        return CheckpointState(
            step=step,
            policy_version=step,
            batches=number,
            counters={},
            normalizer={},
            stored_dtype="float32",
            parameter_names=trained_parameter_names(self._model),
        )


def number_in(checkpoint: Checkpoint) -> int:
    """The number that a checkpoint bears.

    Raises:
        AssertionError: It bears several.
    """
    found = {checkpoint.state.batches, checkpoint.manifest.configuration["number"]}
    for tensor in load_file(checkpoint.path / "model/model.safetensors").values():
        found |= set(tensor.unique().tolist())
    for name, tensor in load_file(checkpoint.path / "optimizer.safetensors").items():
        if name.endswith("/exp_avg"):
            found |= set(tensor.unique().tolist())
    assert len(found) == 1, f"{checkpoint.path} is a mixture of {found}"
    return int(found.pop())


def is_below(directory: Path, event: str, arguments: tuple[Any, ...]) -> bool:
    """Return True for a file system call below a directory."""
    # Files of a tree that is deleted are named relative to a descriptor.
    return event in ("os.remove", "os.rmdir") or (event in EVENTS and str(directory) in str(arguments))


def act(writer: Writer, scenario: str) -> None:
    """What a child does. Before it there is the checkpoint of step 1, bearing 1."""
    if scenario == "next":
        writer.write(2, 2)
        prune_checkpoints(writer.directory, keep=1)
    elif scenario == "replace":
        writer.write(1, 2)
    elif scenario == "recover":
        recover_checkpoints(writer.directory)
        find_newest_whole(writer.directory, verify_checkpoint)
        writer.write(2, 2)


def look(directory: Path) -> int:
    """What the next start finds."""
    recover_checkpoints(directory)
    checkpoint, _ = find_newest_whole(directory, verify_checkpoint)
    left = [path.name for path in directory.iterdir() if not path.name.startswith("step-")]
    assert left == [], left
    assert checkpoint is not None, "there is no checkpoint any more"
    return number_in(checkpoint)


def killed_one_after_the_other(writer: Writer, scenario: str, before: Path) -> None:
    """One child for every third call, until one lives to its end.

    Every single call is that of `tests.trainer.directory_crashes`, whose files are smaller.
    """
    for moment in range(1, 1000, 3):
        shutil.rmtree(writer.directory, ignore_errors=True)
        shutil.copytree(before, writer.directory)
        child = os.fork()
        if child == 0:
            kill_at(moment, partial(is_below, writer.directory))
            act(writer, scenario)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{moment} {status} {look(writer.directory)}\n")
        if status == 0:
            return


def fill_the_disk(model: Path, output: Path, limit: int) -> None:
    """Train until a limit on the size of files refuses a write in the middle of one, as a full disk does."""
    bodies = make_bodies(4)

    def batches() -> Iterator[bytes]:
        yield from bodies[:2]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        yield from bodies[2:]

    try:
        run(model, output, batches())
    except (CheckpointError, MetricsError) as error:  # whichever file meets it first
        sys.stdout.write(f"{error}\n")


def main(model: Path, root: Path, scenario: str) -> None:
    """Run a scenario."""
    torch.set_num_threads(1)
    if scenario.startswith("full disk"):
        fill_the_disk(model, root, int(scenario.split()[-1]))
        return
    disable_progress_bar()
    writer = Writer(model, root / "checkpoints")
    writer.write(1, 1)
    if scenario == "recover":  # as a writer leaves it that dies between its two renames
        path = checkpoint_path(writer.directory, 1)
        path.rename(path.with_name(f".{path.name}.retired-1"))
        shutil.copytree(path.with_name(f".{path.name}.retired-1"), path.with_name(f".{path.name}.partial-x"))
        shutil.copytree(path.with_name(f".{path.name}.retired-1"), path.with_name(".step-000000.deleted-1"))
    before = root / "before"
    writer.directory.rename(before)
    killed_one_after_the_other(writer, scenario, before)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])

"""Checkpoints: everything a run needs to go on as if it had never stopped.

::

    step-000010/
    ├── model/                 ordinary Hugging Face directory, float32 (adapters merged, under LoRA)
    ├── adapter/               PEFT directory, under LoRA only: what resume reads
    ├── optimizer.safetensors  AdamW's moments, one tensor a name "<parameter>/<moment>"
    ├── random.safetensors     random number generator states, one row a process
    └── state.json             step, policy version, counters, normalizer, seeds, configuration

A checkpoint appears under its name only when all of it is on the disk. Nothing in it is a pickle.
"""

from __future__ import annotations

import logging
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer.atomic_directory import atomic_directory
from trainer.errors import CheckpointError
from trainer.model_directory import write_model_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FORMAT = 1
_NAME = re.compile(r"^step-(\d{6,})$")


class RunState(BaseModel):
    """The small part of a checkpoint: `state.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    step: int
    """Optimizer steps done."""
    policy_version: int
    """Version of the weights: optimizer steps since the base weights."""
    batches: int
    """Batches received, trained or not."""
    counters: dict[str, int]
    """Everything set aside so far, by reason."""
    normalizer: dict[str, Any]
    """State of the advantage normalizer."""
    stored_dtype: str
    """Type in which the base checkpoint was stored, e.g. `bfloat16`."""
    parameter_names: list[str]
    """Trained parameters, in the optimizer's order."""
    python_random: list[Any]
    """State of Python's `random`."""
    numpy_random: list[Any]
    """State of NumPy's global generator."""
    configuration: dict[str, Any]
    """The run's configuration, secrets masked; for readers, resume takes the one it is given."""
    versions: dict[str, str]
    """Of the libraries that wrote it."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on the disk, its state read and checked."""

    path: Path
    state: RunState

    @property
    def model_path(self) -> Path:
        """The Hugging Face directory."""
        return self.path / "model"

    @property
    def adapter_path(self) -> Path | None:
        """The PEFT directory, if the run trained adapters."""
        adapter = self.path / "adapter"
        return adapter if adapter.is_dir() else None


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return directory / f"step-{step:06d}"


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _NAME.match(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint.

    Raises:
        CheckpointError: It is not one, or of a format this version does not read.
    """
    try:
        state = RunState.model_validate_json((path / "state.json").read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} is not a checkpoint: {error}") from error
    except ValidationError as error:
        raise CheckpointError(f"{path}/state.json is damaged: {error}") from error
    if state.format != FORMAT:
        raise CheckpointError(f"{path} has format {state.format}; this version reads format {FORMAT}")
    return Checkpoint(path=path, state=state)


def write_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    random_states: dict[str, Tensor],
    state: RunState,
) -> None:
    """Write a checkpoint, atomically; one of the same name is replaced.

    Args:
        path: Its final name.
        model: The unwrapped model.
        tokenizer: Written beside the weights.
        optimizer: Whose state is saved, over the parameters that `state.parameter_names` names.
        random_states: See `collect_random_states`.
        state: The small part.

    Raises:
        CheckpointError: It could not be written; `path` is then as it was before.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_directory(path, replace=True) as directory:
            write_model_directory(directory / "model", model=model, tokenizer=tokenizer)
            if hasattr(model, "peft_config"):
                adapted: Any = model
                adapted.save_pretrained(directory / "adapter", safe_serialization=True)
            save_file(
                _optimizer_tensors(optimizer, state.parameter_names), directory / "optimizer.safetensors"
            )
            save_file(random_states, directory / "random.safetensors")
            (directory / "state.json").write_text(state.model_dump_json(indent=1), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the checkpoint {path}: {error}") from error
    logger.info("Wrote checkpoint %s", path)


def prune_checkpoints(directory: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for path in list_checkpoints(directory)[:-keep]:
        shutil.rmtree(path)
        logger.info("Deleted old checkpoint %s", path)


def trained_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters that are trained, in the order the optimizer is given them."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """AdamW's state as flat tensors; parameter names cannot hold a slash."""
    state = optimizer.state_dict()["state"]
    return {
        f"{names[index]}/{key}": value.detach().contiguous().cpu()
        for index, moments in state.items()
        for key, value in moments.items()
    }


def restore_optimizer(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer, names: list[str]) -> None:
    """Give `optimizer` the moments it had.

    Raises:
        CheckpointError: The checkpoint trained other parameters, or its file is damaged.
    """
    if names != checkpoint.state.parameter_names:
        raise CheckpointError(
            f"{checkpoint.path} trained {len(checkpoint.state.parameter_names)} parameters, this run trains "
            f"{len(names)} or others; resume with the same model and model.lora settings"
        )
    tensors = _load(checkpoint.path / "optimizer.safetensors")
    index_of = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition("/")
        state.setdefault(index_of[parameter], {})[key] = tensor
    fresh = optimizer.state_dict()
    optimizer.load_state_dict({"state": state, "param_groups": fresh["param_groups"]})


def collect_random_states(gather: Any) -> dict[str, Tensor]:
    """This run's torch generator states, one row a process.

    Args:
        gather: Concatenates a tensor of all processes along dimension 0 (`Accelerator.gather`).
    """
    states = {"cpu": gather(torch.get_rng_state()[None]).cpu().contiguous()}
    if torch.cuda.is_available():
        states["cuda"] = gather(torch.cuda.get_rng_state()[None]).cpu().contiguous()
    return states


def restore_random_states(checkpoint: Checkpoint, process_index: int) -> None:
    """Put all random number generators back to where they were.

    With more processes than the checkpoint was written by, the further ones keep their fresh seeds.
    """
    states = _load(checkpoint.path / "random.safetensors")
    if process_index < len(states["cpu"]):
        torch.set_rng_state(states["cpu"][process_index])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"][process_index])
    version, internal, gauss = checkpoint.state.python_random
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = checkpoint.state.numpy_random
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def python_random_state() -> list[Any]:
    """State of Python's `random` as a JSON-able list."""
    version, internal, gauss = random.getstate()
    return [version, list(internal), gauss]


def numpy_random_state() -> list[Any]:
    """State of NumPy's global generator as a JSON-able list."""
    state: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = state
    return [name, keys.tolist(), int(position), int(has_gauss), float(cached)]


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or missing: {error}") from error

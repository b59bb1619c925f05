"""Checkpoints: everything a run needs to go on as if it had never stopped.

::

    step-000010/
    ├── model/                 ordinary Hugging Face directory, float32 (adapters merged, under LoRA)
    ├── adapter/               PEFT directory, under LoRA only: what resume reads
    ├── optimizer.safetensors  AdamW's moments, one tensor a name "<parameter>/<moment>"
    ├── random.safetensors     random number generator states, one row a process
    ├── state.json             step, policy version, counters, normalizer, seeds
    └── manifest.json          sizes and checksums of all the others, configuration, library versions

A checkpoint appears under its name only when all of it is on the disk and was read back. Nothing in it is a
pickle. Which of several is used, kept and deleted: `trainer.checkpoint_store`.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atropos_client.private_files import make_private_directory
from trainer.atomic_directory import atomic_directory
from trainer.errors import CheckpointError, DamagedCheckpoint
from trainer.manifest import (
    MANIFEST_NAME,
    Manifest,
    forget_cached_pages,
    read_manifest,
    verify_files,
    write_manifest,
)
from trainer.model_directory import write_model_directory
from trainer.set_aside_share import ShareState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

STATE_NAME = "state.json"

_MOVED_TO_MANIFEST = ("format", "configuration", "versions")
"""What `state.json` had in format 1 and the manifest has now."""


class RunState(BaseModel):
    """The small part of a checkpoint: `state.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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
    set_aside_window: ShareState = ShareState()
    """What was set aside of the last batches; empty where an earlier version wrote the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on the disk, its state read and checked."""

    path: Path
    state: RunState
    manifest: Manifest | None
    """None for format 1, which had none: its files cannot be verified."""

    @property
    def model_path(self) -> Path:
        """The Hugging Face directory."""
        return self.path / "model"

    @property
    def adapter_path(self) -> Path | None:
        """The PEFT directory, if the run trained adapters."""
        adapter = self.path / "adapter"
        return adapter if adapter.is_dir() else None


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint; of its files only the manifest and the state are read and checked.

    Raises:
        DamagedCheckpoint: One of the two is missing, or is not what was written.
        CheckpointError: It is of a format that this version does not read, or may not be read.
    """
    content = _read_state(path)
    manifest = None
    if isinstance(content, dict) and content.get("format") == 1 and not (path / MANIFEST_NAME).exists():
        content = {name: value for name, value in content.items() if name not in _MOVED_TO_MANIFEST}
    else:
        manifest = read_manifest(path)
    try:
        state = RunState.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise DamagedCheckpoint(f"{STATE_NAME} is damaged: {where}: {first['msg']}") from error
    return Checkpoint(path=path, state=state, manifest=manifest)


def verify_checkpoint(path: Path) -> Checkpoint:
    """Read every byte of a checkpoint, compare it with what was written, and open it.

    One of format 1 has no checksums; of its tensors only the extent can be checked.

    Raises:
        DamagedCheckpoint: A file is missing, or is not what was written; the message names it.
        CheckpointError: It is of a format that this version does not read, or may not be read.
    """
    if (path / MANIFEST_NAME).exists():
        verify_files(path)  # before anything is parsed
    checkpoint = read_checkpoint(path)
    if checkpoint.manifest is None:
        for file in sorted(path.rglob("*.safetensors")):
            _check_extent(file, file.relative_to(path).as_posix())
    return checkpoint


def _read_state(path: Path) -> Any:
    file = path / STATE_NAME
    try:
        return json.loads(file.read_bytes())
    except PermissionError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}; give this user access") from error
    except OSError as error:
        raise DamagedCheckpoint(f"{STATE_NAME} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{STATE_NAME} is damaged: {error}") from error


def _check_extent(file: Path, name: str) -> None:
    try:
        with safe_open(file, framework="pt"):
            return
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{name} is damaged: {error}") from error


def write_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    random_states: dict[str, Tensor],
    state: RunState,
    configuration: Mapping[str, Any],
    versions: Mapping[str, str],
) -> None:
    """Write a checkpoint, atomically; one of the same name is replaced.

    It is flushed to the disk, read back from there (where the system can be made to) and compared with its
    checksums before it gets its name.

    Args:
        path: Its final name.
        model: The unwrapped model.
        tokenizer: Written beside the weights.
        optimizer: Whose state is saved, over the parameters that `state.parameter_names` names.
        random_states: See `collect_random_states`.
        state: The small part.
        configuration: Of the run, without secrets; for readers.
        versions: Of the libraries that count; for readers.

    Raises:
        CheckpointError: It could not be written; `path` is then as it was before.
    """
    try:
        make_private_directory(path.parent)
        with atomic_directory(path, replace=True, verify=_read_back) as directory:
            write_model_directory(directory / "model", model=model, tokenizer=tokenizer)
            if hasattr(model, "peft_config"):
                adapted: Any = model
                adapted.save_pretrained(directory / "adapter", safe_serialization=True)
            save_file(
                _optimizer_tensors(optimizer, state.parameter_names), directory / "optimizer.safetensors"
            )
            save_file(random_states, directory / "random.safetensors")
            (directory / STATE_NAME).write_text(state.model_dump_json(indent=1), encoding="utf-8")
            write_manifest(directory, configuration=configuration, versions=versions)
    except DamagedCheckpoint as error:
        raise CheckpointError(
            f"the checkpoint {path} could not be read back as it was written: {error}. The disk or its "
            "driver is failing; the checkpoint before it stays"
        ) from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the checkpoint {path}: {error}") from error
    logger.info("Wrote checkpoint %s", path)


def _read_back(directory: Path) -> None:
    forget_cached_pages(directory)
    verify_files(directory)


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

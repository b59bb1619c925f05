"""Checkpoints: everything a run needs to go on as if it had never stopped.

::

    step-000010/
    ├── model/                 the base with new weights in float32 (adapters merged, under LoRA)
    ├── adapter/               PEFT directory, under LoRA only: what resume reads
    ├── optimizer.safetensors  AdamW's moments, one tensor a name "<parameter>/<moment>"
    ├── state.json             step, policy version, counters, normalizer, seeds
    └── manifest.json          sizes and checksums of all the others, configuration, library versions

A checkpoint appears under its name only when all of it is on the disk and was read back. Nothing in it is a
pickle. Which of several is used, kept and deleted: `trainer.checkpoints.retention`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atropos_client.private_files import make_private_directory
from atropos_client.readable import require_readable
from trainer.checkpoints.manifest import (
    Manifest,
    forget_cached_pages,
    read_json,
    read_manifest,
    validated,
    verify_files,
    write_manifest,
)
from trainer.errors import CheckpointError, DamagedCheckpoint
from trainer.export.atomic_directory import atomic_directory
from trainer.export.hf_model import write_model_directory
from trainer.model.base_checkpoint import BaseCheckpoint
from trainer.model.weight_stream import WeightStream
from trainer.samples.quarantine_rate import QuarantineWindow

logger = logging.getLogger(__name__)

STATE_NAME = "state.json"


class CheckpointState(BaseModel):
    """The small part of a checkpoint: `state.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    """Optimizer steps done."""
    policy_version: int
    """Version of the weights: optimizer steps since the base weights."""
    batches: int
    """Batches received, trained or not."""
    position: str = ""
    """Of a replay: digest of these batches; see `IncomingBatch`."""
    counters: dict[str, int]
    """Everything set aside so far, by reason."""
    normalizer: dict[str, Any]
    """State of the advantage normalizer."""
    entropy_bonus: dict[str, float] = {}
    """State of an adaptive entropy coefficient; empty without one."""
    stored_dtype: str
    """Type in which the base stores most of its numbers, e.g. `bfloat16`."""
    parameter_names: list[str]
    """Trained parameters, in the optimizer's order."""
    base_weights: str | None = None
    """Which weights the adapters belong to, see `trainer.model.pretrained.weights_identity`; None without
    adapters."""
    set_aside_window: QuarantineWindow = QuarantineWindow()
    """Groups set aside of the last batches."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on the disk, its state read and checked."""

    path: Path
    state: CheckpointState
    manifest: Manifest

    def trained_path(self, *, adapters: bool) -> Path:
        """Where the trained weights lie: the whole model, or the adapters alone.

        Raises:
            CheckpointError: It holds no adapters.
        """
        found = self.path / ("adapter" if adapters else "model")
        if adapters and not found.is_dir():
            raise CheckpointError(
                f"{self.path} holds no adapters, but model.lora is set; resume with the settings of the run"
            )
        return found


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint; of its files only the manifest and the state are read and checked.

    Raises:
        DamagedCheckpoint: One of the two is missing, or is not what was written.
        CheckpointError: It is of a format that this version does not read, or may not be read.
    """
    content = read_json(path / STATE_NAME)
    manifest = read_manifest(path)  # first: it may be of another format
    return Checkpoint(path=path, state=validated(CheckpointState, content, STATE_NAME), manifest=manifest)


def verify_checkpoint(path: Path) -> Checkpoint:
    """Read every byte of a checkpoint, compare it with what was written, and open it.

    Raises:
        DamagedCheckpoint: A file is missing, or is not what was written; the message names it.
        CheckpointError: It is of a format that this version does not read, or may not be read.
    """
    verify_files(path)  # before anything is parsed
    return read_checkpoint(path)


def write_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    base: BaseCheckpoint,
    optimizer: torch.optim.Optimizer,
    state: CheckpointState,
    configuration: Mapping[str, Any],
    versions: Mapping[str, str],
) -> None:
    """Write a checkpoint, atomically; one of the same name is replaced.

    It is flushed to the disk, read back from there (where the system can be made to) and compared with its
    checksums before it gets its name.

    Args:
        path: Its final name.
        model: The unwrapped model.
        base: What it was loaded from.
        optimizer: Whose state is saved, over the parameters that `state.parameter_names` names.
        state: The small part.
        configuration: Of the run, without secrets.
        versions: Of the libraries that count; for readers.

    Raises:
        CheckpointError: It could not be written; `path` is then as it was before.
    """
    try:
        make_private_directory(path.parent)
        with atomic_directory(path, replace=True, verify=_read_back) as directory:
            write_model_directory(directory / "model", WeightStream(model, base, dtype=torch.float32))
            if hasattr(model, "peft_config"):
                adapted: Any = model
                adapted.save_pretrained(directory / "adapter", safe_serialization=True)
            save_file(
                _optimizer_tensors(optimizer, state.parameter_names), directory / "optimizer.safetensors"
            )
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


def _load(path: Path) -> dict[str, Tensor]:
    try:
        require_readable(path)  # safetensors says of a file that may not be read that there is none
        return load_file(path)
    except PermissionError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or missing: {error}") from error

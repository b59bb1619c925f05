"""Checkpoints: everything a run needs to go on as if it had never stopped.

::

    step-000010/
    ├── model/                 the base with new weights in float32 (adapters merged, under LoRA)
    ├── adapter/               PEFT directory, under LoRA only: what resume reads
    ├── optimizer.safetensors  AdamW's moments, one tensor a name "<parameter>/<moment>"; several files,
    │                          optimizer-00001-of-00003.safetensors, where they are large
    ├── state.json             step, policy version, counters, normalizer, seeds
    └── manifest.json          sizes and checksums of all the others, configuration, library versions

A checkpoint appears under its name only when all of it is on the disk and was read back. Nothing in it is a
pickle, and nothing in it tells how many processes wrote it, or how weights were spread over them. Which of
several is used, kept and deleted: `trainer.checkpoints.retention`.
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
from torch import nn

from atropos_client.private_files import PRIVATE_DIRECTORY, make_private_directory
from trainer.checkpoints.manifest import (
    Manifest,
    forget_cached_pages,
    read_json,
    read_manifest,
    validated,
    verify_files,
    write_manifest,
)
from trainer.checkpoints.optimizer_state import read_optimizer, write_optimizer
from trainer.errors import CheckpointError, DamagedCheckpoint
from trainer.export.hf_model import fill_model_directory
from trainer.export.shared_directory import failing_together, shared_directory
from trainer.model.base_checkpoint import BaseCheckpoint
from trainer.model.sharding import WHOLE, Spread
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
    spread: Spread = WHOLE,
) -> None:
    """Write a checkpoint, atomically; one of the same name is replaced.

    Where weights are spread over processes, all of them call it, and each writes some of the files.

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
        spread: How model and optimizer state are spread.

    Raises:
        CheckpointError: It could not be written, by this process or another; `path` is then as it was before.
    """
    try:
        with failing_together(spread, path):
            make_private_directory(path.parent)
            spread.settle(model)
        with shared_directory(path, spread, replace=True, verify=_read_back) as directory:
            with failing_together(spread, path):
                (directory / "model").mkdir(mode=PRIVATE_DIRECTORY, exist_ok=True)
            # Each part by itself: who cannot write one does not take part in the collectives of the next.
            with failing_together(spread, path):
                stream = WeightStream(model, base, dtype=torch.float32, spread=spread)
                fill_model_directory(directory / "model", stream)
            with failing_together(spread, path):
                _write_adapter(directory / "adapter", model, spread)
            with failing_together(spread, path):
                write_optimizer(directory, optimizer, state.parameter_names, spread)
                if spread.rank == 0:
                    (directory / STATE_NAME).write_text(state.model_dump_json(indent=1), encoding="utf-8")
            if spread.rank == 0:
                write_manifest(directory, configuration=configuration, versions=versions)
    except DamagedCheckpoint as error:
        raise CheckpointError(
            f"the checkpoint {path} could not be read back as it was written: {error}. The disk or its "
            "driver is failing; the checkpoint before it stays"
        ) from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the checkpoint {path}: {error}") from error
    if spread.rank == 0:
        logger.info("Wrote checkpoint %s", path)


def _read_back(directory: Path) -> None:
    forget_cached_pages(directory)
    verify_files(directory)


def trained_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters that are trained, in the order the optimizer is given them."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _write_adapter(directory: Path, model: Any, spread: Spread) -> None:
    """Let PEFT write the adapters, on process 0; nothing without any."""
    if not hasattr(model, "peft_config"):
        return
    tensors = None  # PEFT's own choice of them
    if spread.sharded:
        state = model.state_dict()
        tensors = {name: spread.whole_on(state[name], 0) for name in state if "lora_" in name}
    if spread.rank == 0:
        model.save_pretrained(directory, safe_serialization=True, state_dict=tensors)


def restore_optimizer(
    checkpoint: Checkpoint, optimizer: torch.optim.Optimizer, model: nn.Module, spread: Spread = WHOLE
) -> None:
    """Give `optimizer`, which trains `model`, the moments it had.

    Raises:
        CheckpointError: The checkpoint trained other parameters, or its file is damaged.
    """
    names = trained_parameter_names(model)
    if names != checkpoint.state.parameter_names:
        raise CheckpointError(
            f"{checkpoint.path} trained {len(checkpoint.state.parameter_names)} parameters, this run trains "
            f"{len(names)} or others; resume with the same model and model.lora settings"
        )
    in_8_bit = getattr(optimizer, "in_8_bit", lambda parameter: False)
    parameters = dict(model.named_parameters())
    read = read_optimizer(checkpoint.path, checkpoint.manifest, parameters, spread, in_8_bit)
    state = {index: read[name] for index, name in enumerate(names) if name in read}
    fresh = optimizer.state_dict()
    optimizer.load_state_dict({"state": state, "param_groups": fresh["param_groups"]})

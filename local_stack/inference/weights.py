"""Reading checkpoints and putting them into a running model, whole or not at all.

Only safetensors are read: other formats can run code. Names, shapes and kinds of numbers must be those of the
served model; all of that is checked, and every tensor is in memory, before the first one is replaced.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from atropos_client.readable import require_readable
from local_stack.inference.errors import CheckpointMismatch
from trainer.model.base_checkpoint import weight_file_names

_MOST_FAULTS_IN_MESSAGE = 5


@torch.inference_mode()
def fill_model(model: torch.nn.Module, checkpoint: Mapping[str, torch.Tensor]) -> None:
    """Copy a checkpoint into the model, converting the precision.

    Raises:
        CheckpointMismatch: Missing or unknown names, other shapes, another kind of numbers, or tied weights
            that differ. Nothing was changed.
    """
    targets: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    names_of: dict[int, list[str]] = defaultdict(list)  # tied weights are one tensor with several names
    for name, tensor in targets.items():
        names_of[id(tensor)].append(name)
    faults = [f"has the unknown {name}" for name in sorted(set(checkpoint) - set(targets))]
    sources: dict[str, torch.Tensor] = {}
    for names in names_of.values():
        target, present = targets[names[0]], [name for name in names if name in checkpoint]
        if not present:
            faults.append(f"is missing {' or '.join(names)}")
            continue
        tensor = sources[names[0]] = checkpoint[present[0]]
        if tensor.shape != target.shape:
            shapes = f"{list(tensor.shape)}, not {list(target.shape)}"
            faults.append(f"has the wrong shape for {present[0]}: {shapes}")
        if tensor.is_floating_point() != target.is_floating_point() or tensor.element_size() < 2:
            faults.append(f"holds numbers of another kind in {present[0]}: {tensor.dtype}")
        if any(not torch.equal(tensor, checkpoint[name]) for name in present[1:]):
            faults.append(f"holds different values for the tied weights {' and '.join(present)}")
    if faults:
        more = len(faults) - _MOST_FAULTS_IN_MESSAGE
        listed = "; ".join(faults[:_MOST_FAULTS_IN_MESSAGE]) + (f"; and {more} more" if more > 0 else "")
        raise CheckpointMismatch(
            f"the checkpoint {listed}. The weights served before stay in use.", parameter="weights_path"
        )
    for name, tensor in sources.items():
        targets[name].copy_(tensor)


def read_checkpoint(directory: Path) -> dict[str, torch.Tensor]:
    """Read all safetensors of a Hugging Face directory into memory.

    Raises:
        CheckpointMismatch: There are none, or a file cannot be read.
    """
    if not directory.is_dir():
        raise CheckpointMismatch(f"{directory} is not a directory on the inference server's machine")
    path = directory
    tensors: dict[str, torch.Tensor] = {}
    try:
        require_readable(directory)
        for name in weight_file_names(directory):
            path = directory / name
            tensors.update(load_file(path))
    except PermissionError as error:
        raise CheckpointMismatch(f"{error.filename} cannot be loaded: {error.strerror}") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointMismatch(f"{path} cannot be read as safetensors: {error}") from error
    except ValueError as error:
        raise CheckpointMismatch(str(error)) from error
    return tensors

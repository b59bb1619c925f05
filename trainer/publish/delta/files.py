"""Files of a version: what it changes, or all of it. Safetensors, whole or not there.

Of each changed tensor `<name>:gaps` has the packed places (`bits.pack_indices`) and `<name>:values` the
numbers there; a tensor of which most has changed is there whole, under its name. The header's metadata say
the version, the version that it applies to, and the checksums of the whole model's bits before and after.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from trainer.export.tensor_file import TensorFile
from trainer.model.base_checkpoint import StoredTensor, make_header
from trainer.publish.delta.bits import pack_indices
from trainer.publish.delta.snapshot import Change

FORMAT = "atropos-delta/1"


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """One file that servers may read."""

    name: str
    size: int
    """Bytes."""
    sha256: str
    changed: int
    """Numbers in it."""


@dataclass(frozen=True, kw_only=True)
class Label:
    """What a file says of itself."""

    version: int
    checksum: str
    """Of the whole model's bits."""
    base_version: int = -1
    """The version that it applies to; -1: to any."""
    base_checksum: str = ""


def delta_name(version: int) -> str:
    """The name of the file that holds what a version changes."""
    return f"v{version:06d}.delta.safetensors"


def whole_name(version: int) -> str:
    """The name of the file that holds all of a version."""
    return f"v{version:06d}.whole.safetensors"


def write_delta(
    path: Path, label: Label, changes: Mapping[str, Change], tensors: Mapping[str, Tensor], *, mode: int
) -> PublishedFile:
    """Write what a version changes.

    Args:
        path: The file; it appears whole or not at all.
        label: What it says of itself.
        changes: As `Snapshot.advance` returned them.
        tensors: The version's tensors, of which some travel whole.
        mode: Permissions of published directories; the file gets the same without the right to enter.

    Raises:
        OSError: The file system refused.
    """
    parts: dict[str, Tensor] = {}
    for name, change in changes.items():
        whole = tensors[name]
        if change.values is None or change.indices is None:
            parts[name] = whole
            continue
        gaps = pack_indices(change.indices)
        if gaps.nbytes + change.values.nbytes >= whole.nbytes:
            parts[name] = whole
        else:
            parts[f"{name}:gaps"], parts[f"{name}:values"] = gaps, change.values
    shapes = {name: tuple(tensors[name].shape) for name in changes}
    return _write(path, label, shapes, parts, mode)


def write_whole(path: Path, label: Label, tensors: Mapping[str, Tensor], *, mode: int) -> PublishedFile:
    """Write all of a version; see `write_delta`."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return _write(path, label, shapes, tensors, mode)


def _write(
    path: Path, label: Label, shapes: Mapping[str, tuple[int, ...]], parts: Mapping[str, Tensor], mode: int
) -> PublishedFile:
    # Wide numbers come first, so that every tensor is aligned.
    ordered = dict(sorted(parts.items(), key=lambda part: -part[1].dtype.itemsize))
    layout = {name: StoredTensor(part.dtype, tuple(part.shape)) for name, part in ordered.items()}
    metadata = {"format": FORMAT, "shapes": json.dumps(shapes, separators=(",", ":"))}
    metadata |= {name: str(value) for name, value in asdict(label).items()}
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    with TensorFile(partial, layout, make_header(metadata, layout)) as file:
        for name, part in ordered.items():
            file.write(name, part)
    partial.chmod(mode & 0o666)
    with partial.open("rb") as written:
        sha256 = hashlib.file_digest(written, "sha256").hexdigest()
    partial.replace(path)
    return PublishedFile(
        name=path.name,
        size=path.stat().st_size,
        sha256=sha256,
        changed=sum(part.numel() for name, part in parts.items() if not name.endswith(":gaps")),
    )

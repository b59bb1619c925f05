"""Files of a version: what it changes, or all of it. Safetensors, whole or not there.

Of each changed tensor `<name>:gaps` has the packed places (`bits.pack_gaps`), `<name>:moves` by how much
the bits there have moved, and `<name>:values` the numbers that moved far (`bits.pack_moves`); a tensor of
which most has changed is there whole, under its name. The header's metadata say the version, the version that
it applies to, and the checksums of the whole model's bits before and after.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.export.tensor_file import TensorFile
from trainer.model.base_checkpoint import StoredTensor, WeightFile, make_header, open_weights
from trainer.publish.delta.bits import add_moves, bits, tensor_sum, unpack_indices

FORMAT = "atropos-delta/2"


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """One file that servers may read."""

    name: str
    size: int
    """Bytes."""
    sha256: str


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


def write_file(
    path: Path,
    label: Label,
    shapes: Mapping[str, tuple[int, ...]],
    layout: Mapping[str, StoredTensor],
    parts: Iterable[tuple[str, Tensor]],
    *,
    mode: int,
) -> PublishedFile:
    """Write what a version changes, or all of it, part by part.

    Args:
        path: The file; it appears whole or not at all.
        label: What it says of itself.
        shapes: Of the tensors of which it holds something, by name.
        layout: What it holds (`Update.choose`).
        parts: The same, in any order. They may be left in the middle by an error.
        mode: Permissions of published directories; the file gets the same without the right to enter.

    Raises:
        OSError: The file system refused.
    """
    # Wide numbers come first, so that every tensor is aligned.
    ordered = dict(sorted(layout.items(), key=lambda part: -part[1].dtype.itemsize))
    metadata = {"format": FORMAT, "shapes": json.dumps(shapes, separators=(",", ":"))}
    metadata |= {name: str(value) for name, value in asdict(label).items()}
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        with TensorFile(partial, ordered, make_header(metadata, ordered)) as file:
            for name, part in parts:
                file.write(name, part)
                del part  # before the next one is made
        partial.chmod(mode & 0o666)
        with partial.open("rb") as written:
            sha256 = hashlib.file_digest(written, "sha256").hexdigest()
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return PublishedFile(name=path.name, size=path.stat().st_size, sha256=sha256)


def read_version(
    directory: Path, files: Sequence[PublishedFile], sums: Mapping[str, int]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a version, one at a time.

    Args:
        directory: Where the files are.
        files: One with all of a version, and those with what each one after it changed.
        sums: Of the bits that each tensor then has.

    Raises:
        OSError: One of them cannot be read, or is not what was written.
    """
    for file in files:
        with (directory / file.name).open("rb") as written:
            if hashlib.file_digest(written, "sha256").hexdigest() != file.sha256:
                raise OSError(f"{file.name} is damaged")
    whole, *deltas = [open_weights(directory / file.name) for file in files]
    for name in whole.tensors:
        tensor = _read(whole, name)
        for delta in deltas:
            if name in delta.tensors:
                tensor = _read(delta, name)
            elif f"{name}:gaps" in delta.tensors:
                _change(tensor, delta, name)
        if tensor_sum(tensor) != sums[name]:
            raise OSError(f"{name} in {files[0].name} and the files after it is not what was published")
        yield name, tensor
        del tensor


def _change(tensor: Tensor, delta: WeightFile, name: str) -> None:
    places = unpack_indices(_read(delta, f"{name}:gaps")).numpy()
    numbers: Any = bits(tensor).view(-1).numpy()
    far = bits(_read(delta, f"{name}:values"))
    moved = add_moves(torch.from_numpy(numbers[places]), _read(delta, f"{name}:moves"), far)
    numbers[places] = moved.numpy()


def _read(file: WeightFile, name: str) -> Tensor:
    stored = file.tensors[name]
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    numbers: Any = tensor.view(-1).view(torch.uint8).numpy()
    content, at = memoryview(numbers), 0
    for piece in file.read(name):
        content[at : at + len(piece)] = piece
        at += len(piece)
    return tensor

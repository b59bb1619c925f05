"""A model as an ordinary Hugging Face directory, written whole or not at all.

The directory is the base with new weights: the same files and the same tensor names, types and shards; at a
learning rate of 0 also the same bytes. Tensors of the base that the model does not have, for instance those
of a vision tower, are copied. Wrappers that training puts around a model are stripped, and LoRA adapters are
merged into the weights they adapt.

Data flow: model -> `WeightStream` -> each tensor's place in its file -> atomic directory. No more than a
piece of the model is copied on the way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atropos_client.private_files import PRIVATE_DIRECTORY
from trainer.errors import CheckpointError
from trainer.export.atomic_directory import atomic_directory
from trainer.model.base_checkpoint import INDEX_FILE, BaseCheckpoint, StoredTensor, WeightFile, make_header
from trainer.model.weight_stream import WeightEntry, WeightStream


def write_model_directory(
    path: Path,
    stream: WeightStream,
    weights: Iterable[tuple[str, Tensor]] | None = None,
    *,
    replace: bool = False,
    durable: bool = True,
    mode: int = PRIVATE_DIRECTORY,
) -> None:
    """Write the model of `stream` as the directory `path`, atomically.

    Args:
        path: The directory's final name. It appears only when everything in it is on the disk.
        stream: The weights, and the base that they are written like.
        weights: What is written instead of the stream's weights: a copy of them. None: the weights.
        replace: As of `atomic_directory`.
        durable: As of `atomic_directory`.
        mode: As of `atomic_directory`.

    Raises:
        CheckpointError: An adapter cannot be merged, or the file system refused. `path` is then as it was.
    """
    try:
        with atomic_directory(path, replace=replace, durable=durable, mode=mode) as directory:
            entries = {entry.name: entry for entry in stream.entries()}
            _fill(directory, stream.base, entries, stream.weights() if weights is None else weights)
    except OSError as error:
        raise CheckpointError(f"cannot write the model to {path}: {error}") from error


def capture_model(stream: WeightStream) -> Callable[..., None]:
    """Copy a model's weights to the CPU, so that they can be written while the model trains on.

    The copy has the size of the model as it is written.

    Returns:
        Writes the copy, from any thread, as `write_model_directory` does: `write(path, durable=False)`.

    Raises:
        CheckpointError: An adapter cannot be merged.
    """
    weights = [(name, tensor.to("cpu", copy=True)) for name, tensor in stream.weights()]
    return partial(write_model_directory, stream=stream, weights=weights)


def _fill(
    directory: Path,
    base: BaseCheckpoint,
    entries: Mapping[str, WeightEntry],
    weights: Iterable[tuple[str, Tensor]],
) -> None:
    layouts = {name: _layout(file, entries) for name, file in base.weight_files.items()}
    for name, content in base.files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(_index(content, base, layouts) if name == INDEX_FILE else content)
    with ExitStack() as stack:
        places = {}
        for file_name, layout in layouts.items():
            stored = base.weight_files[file_name]
            file = stack.enter_context((directory / file_name).open("xb"))
            header = stored.header if layout == stored.tensors else make_header(stored.metadata, layout)
            offset = file.write(len(header).to_bytes(8, "little")) + file.write(header)
            for name, tensor in layout.items():
                if name in entries:
                    places[name] = file, offset
                else:  # the model has no such tensor
                    file.seek(offset)
                    file.writelines(stored.read(name))
                offset += tensor.nbytes
        for name, weight in weights:
            file, offset = places[name]
            file.seek(offset)
            file.write(_bytes_of(weight))


def _layout(file: WeightFile, entries: Mapping[str, WeightEntry]) -> Mapping[str, StoredTensor]:
    """Return the tensors of a file as they are written, in the order of their data.

    Where types change, wide ones come first, so that every tensor is aligned.
    """
    tensors = {
        name: StoredTensor(entries[name].dtype, tensor.shape) if name in entries else tensor
        for name, tensor in file.tensors.items()
    }
    if tensors == file.tensors:
        return file.tensors
    return dict(sorted(tensors.items(), key=lambda entry: -entry[1].dtype.itemsize))


def _index(content: bytes, base: BaseCheckpoint, layouts: Mapping[str, Mapping[str, StoredTensor]]) -> bytes:
    """Return the index of the weight files; only their size may differ."""

    def size(files: Iterable[Iterable[StoredTensor]]) -> int:
        return sum(tensor.nbytes for file in files for tensor in file)

    before = size(file.tensors.values() for file in base.weight_files.values())
    after = size(tensors.values() for tensors in layouts.values())
    if before == after:
        return content
    return re.sub(rb'("total_size"\s*:\s*)[\d.]+', rb"\g<1>%d" % after, content)


def _bytes_of(tensor: Tensor) -> memoryview:
    numbers: Any = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()
    return memoryview(numbers)

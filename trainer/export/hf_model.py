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

from torch import Tensor

from atropos_client.private_files import PRIVATE_DIRECTORY
from trainer.errors import CheckpointError
from trainer.export.shared_directory import shared_directory
from trainer.export.tensor_file import TensorFile, write_tensors
from trainer.model.base_checkpoint import INDEX_FILE, BaseCheckpoint, StoredTensor, WeightFile, make_header
from trainer.model.sharding import WHOLE
from trainer.model.weight_copy import WeightCopy
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
        spread = stream.spread if weights is None else WHOLE
        with shared_directory(path, spread, replace=replace, durable=durable, mode=mode) as directory:
            fill_model_directory(directory, stream, weights)
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


def write_copy(
    path: Path, stream: WeightStream, copy: WeightCopy, *, durable: bool = True, mode: int = PRIVATE_DIRECTORY
) -> None:
    """Write the directory `path` from a copy of spread weights, a weight at a time; on process 0, once.

    In any thread, while one in each of the others goes through its copy.

    Args:
        path: See `write_model_directory`.
        stream: The weights, and the base that they are written like.
        copy: Of the stream.
        durable: As of `atomic_directory`.
        mode: As of `atomic_directory`.

    Raises:
        CheckpointError: The file system refused.
    """
    try:
        write_model_directory(path, stream, copy.weights(), durable=durable, mode=mode)
    except CheckpointError:
        copy.finish()  # the others wait until they have sent all
        raise


def write_without_copy(path: Path, stream: WeightStream, *, mode: int = PRIVATE_DIRECTORY) -> None:
    """Write the directory `path` from the live model, a weight at a time, not flushed to the disk.

    Where weights are spread over processes, process 0 calls it while the others go through the stream's
    weights. It goes through them to the end also where it fails: the others send their rows, and would wait.

    Args:
        path: See `write_model_directory`.
        stream: The weights, and the base that they are written like.
        mode: As of `atomic_directory`.

    Raises:
        CheckpointError: See `write_model_directory`.
    """
    weights = stream.weights()
    try:
        write_model_directory(path, stream, weights, durable=False, mode=mode)
    finally:
        for _ in weights:
            pass


def fill_model_directory(
    directory: Path, stream: WeightStream, weights: Iterable[tuple[str, Tensor]] | None = None
) -> None:
    """Write the model of `stream` into an empty directory.

    Where its weights are spread over processes, all of them call it: each writes some of the weight files,
    and gets the tensors for these whole, one at a time.

    Args:
        directory: The same on every process.
        stream: The weights, and the base that they are written like.
        weights: See `write_model_directory`.

    Raises:
        CheckpointError: An adapter cannot be merged.
        OSError: The file system refused.
    """
    base, spread = stream.base, stream.spread if weights is None else WHOLE
    entries = {entry.name: entry for entry in stream.entries()}
    layouts = {name: _layout(file, entries) for name, file in base.weight_files.items()}
    owners = spread.owners({name: sum(each.nbytes for each in layouts[name].values()) for name in layouts})
    places: dict[str, TensorFile] = {}
    with ExitStack() as stack:
        failure: OSError | None = None
        try:
            if spread.rank == 0:
                _write_beside(directory, base, layouts)
            for file_name in (name for name in layouts if owners[name] == spread.rank):
                layout, stored = layouts[file_name], base.weight_files[file_name]
                header = stored.header if layout == stored.tensors else make_header(stored.metadata, layout)
                file = stack.enter_context(TensorFile(directory / file_name, layout, header))
                for name in layout:
                    if name in entries:
                        places[name] = file
                    else:  # the model has no such tensor
                        file.copy(name, stored.read(name))
        except OSError as error:
            failure = error
        if weights is None:
            of_weights = {name: owners[file] for file, layout in layouts.items() for name in layout}
            weights = stream.weights(of_weights)
        write_tensors(places, weights, failure, flush=spread.sharded)


def _write_beside(
    directory: Path, base: BaseCheckpoint, layouts: Mapping[str, Mapping[str, StoredTensor]]
) -> None:
    for name, content in base.files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(_index(content, base, layouts) if name == INDEX_FILE else content)


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

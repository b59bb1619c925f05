"""A safetensors file that is written tensor by tensor, in any order."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from trainer.model.base_checkpoint import StoredTensor, make_header


class TensorFile:
    """A safetensors file under construction; a context manager that closes it.

    Args:
        path: Its name; it must not exist.
        tensors: All that it will hold, in the order of their data.
        header: As of `make_header`. None: made.

    Raises:
        OSError: The file system refused; so do the methods.
    """

    def __init__(self, path: Path, tensors: Mapping[str, StoredTensor], header: bytes | None = None) -> None:
        header = make_header({}, tensors) if header is None else header
        self._starts: dict[str, int] = {}
        offset = 8 + len(header)
        for name, tensor in tensors.items():
            self._starts[name] = offset
            offset += tensor.nbytes
        self._file = path.open("xb")
        self._file.write(len(header).to_bytes(8, "little") + header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor's numbers to their place."""
        numbers: Any = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()
        self.copy(name, [memoryview(numbers)])

    def copy(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Write a tensor's bytes to their place."""
        self._file.seek(self._starts[name])
        self._file.writelines(pieces)

    def flush(self) -> None:
        """See that the system has it on the disk: another process cannot, from another machine."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def write_tensors(
    places: Mapping[str, TensorFile],
    tensors: Iterable[tuple[str, Tensor]],
    failure: OSError | None = None,
    *,
    flush: bool,
) -> None:
    """Write tensors into their files.

    Takes all of them also where one cannot be written: other processes send their parts in the same order,
    and would wait for this one.

    Args:
        places: The file of each.
        tensors: Names and tensors.
        failure: What happened before, on this process alone; then nothing is written.
        flush: Flush the files, see `TensorFile.flush`.

    Raises:
        OSError: The file system refused, or `failure`.
    """
    for name, tensor in tensors:
        try:
            if failure is None:
                places[name].write(name, tensor)
        except OSError as error:
            failure = error
        del tensor  # before the next one is made
    if failure is not None:
        raise failure
    if flush:
        for file in set(places.values()):
            file.flush()

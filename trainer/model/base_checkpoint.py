"""The files that a model was loaded from: what is written again, with new weights.

Only weights change in training. So the configuration, tokenizer, processor, chat template and generation
files are kept as bytes, and the weight files' headers say which tensors there are, of which type, in which
file. `save_pretrained` would add, rename, round and leave out.
"""

from __future__ import annotations

import json
import os
import re
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_COPIED = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "LICENSE*", "NOTICE*")
"""Files that `from_pretrained` and inference servers read beside the weights, and the terms of use."""
_CODE = "*.py"
_NOT_COPIED = ("*.index.json", "adapter_config.json", "trainer_state.json")
_TEMPLATES = "additional_chat_templates"
_TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "tekken.json"),
    *("*.model", "*.tiktoken", "*.jinja", "chat_template.json"),
)
"""Of these, the files that belong to the tokenizer."""

_HEADER_LIMIT = 100_000_000
"""The longest header that the safetensors library reads."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Types by their name in a safetensors header."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a weight file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file: its header, and its data where they are needed."""

    header: bytes
    """As it is in the file, padding included."""
    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]
    """In the order of their data."""
    starts: Mapping[str, int]
    """Each tensor's first byte in the file."""
    descriptor: int
    """The open file: still readable when its name has gone."""

    def read(self, name: str) -> Iterator[bytes]:
        """Yield a tensor's bytes in pieces.

        Raises:
            OSError: The file cannot be read, or has been cut off since.
        """
        offset = self.starts[name]
        end = offset + self.tensors[name].nbytes
        while offset < end:
            piece = os.pread(self.descriptor, min(end - offset, 1 << 20), offset)
            if not piece:
                raise OSError(f"{name} was cut off while the run lasted")
            yield piece
            offset += len(piece)


@dataclass(frozen=True)
class BaseCheckpoint:
    """The checkpoint that a model was loaded from."""

    files: Mapping[str, bytes]
    """Everything that goes with the weights, by name."""
    weight_files: Mapping[str, WeightFile]

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor, by name."""
        return {name: tensor for file in self.weight_files.values() for name, tensor in file.tensors.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The type that most floating-point numbers have."""
        numbers: Counter[torch.dtype] = Counter()
        for tensor in self.tensors.values():
            if tensor.dtype.is_floating_point:
                numbers[tensor.dtype] += torch.Size(tensor.shape).numel()
        return max(numbers, key=lambda dtype: numbers[dtype], default=torch.float32)

    def declaring(self, dtype: torch.dtype) -> BaseCheckpoint:
        """Return this base with a configuration that names another type; servers compute in it."""
        text = self.files["config.json"].decode("utf-8")
        name = str(dtype).removeprefix("torch.")
        text, found = re.subn(r'("(?:torch_)?dtype"\s*:\s*)"\w+"', rf'\1"{name}"', text)
        if not found:
            text = json.dumps(json.loads(text) | {"dtype": name}, indent=2) + "\n"
        return replace(self, files={**self.files, "config.json": text.encode("utf-8")})


def read_base(
    path: str, *, tokenizer_path: str | None = None, trust_remote_code: bool = False
) -> BaseCheckpoint:
    """Read what a model was loaded from: all but the weights, and the weight files' headers.

    Args:
        path: A directory, or a hub id whose weights have been loaded.
        tokenizer_path: The tokenizer's files come from there.
        trust_remote_code: Code of the model's own goes with it.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not laid out as a safetensors checkpoint.
    """
    directory = _directory(path)
    files = _read_files(directory, trust_remote_code)
    if tokenizer_path is not None:
        theirs = _read_files(_directory(tokenizer_path), trust_remote_code)
        files = {name: content for name, content in files.items() if not _is_tokenizer(name)}
        files |= {name: content for name, content in theirs.items() if _is_tokenizer(name)}
    names = weight_file_names(directory)
    if names != [SINGLE_FILE]:
        files[INDEX_FILE] = (directory / INDEX_FILE).read_bytes()
    return BaseCheckpoint(files, {name: open_weights(directory / name) for name in names})


def weight_file_names(directory: Path) -> list[str]:
    """Return the names of a checkpoint's safetensors files, in order.

    Raises:
        OSError: There are none, or their index cannot be read.
        ValueError: The index names something else than safetensors files beside it, or is no index.
    """
    if (directory / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    index = directory / INDEX_FILE
    if not index.is_file():
        raise FileNotFoundError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is not an index of safetensors: {error!r}") from error
    if strange := [name for name in names if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", str(name))]:
        raise ValueError(f"{index} names {strange[0]!r}, which is not a safetensors file beside it")
    return names


def _directory(path: str) -> Path:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    # Loading has fetched the weights, and what it needed itself, into the same place.
    return Path(snapshot_download(path, allow_patterns=[*_COPIED, _CODE], ignore_patterns=["*/*"]))


def _read_files(directory: Path, trust_remote_code: bool) -> dict[str, bytes]:
    patterns = (*_COPIED, _CODE) if trust_remote_code else _COPIED
    names = [
        *sorted(file.name for file in directory.iterdir() if file.is_file()),
        *(f"{_TEMPLATES}/{file.name}" for file in sorted((directory / _TEMPLATES).glob("*.jinja"))),
    ]
    return {
        name: (directory / name).read_bytes()
        for name in names
        if any(fnmatch(name, pattern) for pattern in patterns)
        and not any(fnmatch(name, pattern) for pattern in _NOT_COPIED)
    }


def _is_tokenizer(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _TOKENIZER)


def open_weights(path: Path) -> WeightFile:
    """Read a safetensors file's header; it has been read or written already, so it is a sound one."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        header = os.pread(descriptor, min(length, _HEADER_LIMIT), 8)
        content = json.loads(header)
        metadata = content.pop("__metadata__", {})
        entries = dict(sorted(content.items(), key=lambda entry: entry[1]["data_offsets"]))
        tensors = {
            name: StoredTensor(_dtype(entry["dtype"], path), tuple(entry["shape"]))
            for name, entry in entries.items()
        }
        starts = {name: 8 + len(header) + entry["data_offsets"][0] for name, entry in entries.items()}
    except BaseException:
        os.close(descriptor)
        raise
    file = WeightFile(header, metadata, tensors, starts, descriptor)
    weakref.finalize(file, os.close, descriptor)
    return file


def _dtype(name: str, path: Path) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"{path.name} stores {name}, a type that is not trained; use an unquantized base")
    return DTYPES[name]


def make_header(metadata: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> bytes:
    """Return the header of a safetensors file that holds `tensors` one behind the other."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        content[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    return encoded + b" " * (-len(encoded) % 8)

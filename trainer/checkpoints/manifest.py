"""A checkpoint's manifest: what every file of it has to be, how it was configured, and what wrote it.

`manifest.json` is written last. It holds size and SHA-256 of every other file, and a checksum of itself, so
that a file that is missing, cut off, or changed by a single bit is found before anything is loaded from it.

Data flow: written files -> hashed while the system still has them in memory -> manifest.json -> all of it on
the disk -> read again and compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.errors import CheckpointError, DamagedCheckpoint

FORMAT: Final = 3
"""Of the whole checkpoint; no other is read."""

_Model = TypeVar("_Model", bound=BaseModel)

MANIFEST_NAME: Final = "manifest.json"

_HASHING_THREADS: Final = 4
"""Files that are hashed at the same time; hashing needs no lock of the interpreter."""


class FileRecord(BaseModel):
    """Size and checksum that a file has to have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int
    """Bytes."""
    sha256: str
    """Hexadecimal."""


class Manifest(BaseModel):
    """The content of `manifest.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int
    files: dict[str, FileRecord]
    """Every file but the manifest, by its path below the checkpoint, with `/` between the parts."""
    configuration: dict[str, Any]
    """The run's configuration, secrets masked; a resumed run is compared with it."""
    versions: dict[str, str]
    """Of the libraries that wrote it."""
    checksum: str
    """SHA-256 of the rest of the manifest: as JSON with sorted keys, `,` and `:` without spaces."""


def write_manifest(directory: Path, *, configuration: Mapping[str, Any], versions: Mapping[str, str]) -> None:
    """Write the manifest of all files that lie in `directory` now.

    Args:
        directory: The checkpoint, whole but for its manifest.
        configuration: Without secrets.
        versions: Of the libraries that count.

    Raises:
        OSError: A file cannot be read, or the manifest not written.
    """
    names = _files_below(directory)
    records = {
        name: {"size": (directory / name).stat().st_size, "sha256": digest}
        for name, digest in _digests(directory, names).items()
    }
    content: dict[str, Any] = {
        "format": FORMAT,
        "files": records,
        "configuration": dict(configuration),
        "versions": dict(versions),
    }
    content["checksum"] = _checksum(content)
    (directory / MANIFEST_NAME).write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_manifest(directory: Path) -> Manifest:
    """Read a manifest and prove that it is as it was written; says nothing about the files it names.

    Raises:
        DamagedCheckpoint: It is missing or not what was written.
        CheckpointError: It is whole and of a format that this version does not read, or may not be read.
    """
    content = read_json(directory / MANIFEST_NAME)
    if not isinstance(content, dict) or content.get("checksum") != _checksum(content):
        raise DamagedCheckpoint(f"{MANIFEST_NAME} is not what was written: its own checksum differs")
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{directory} has format {content.get('format')}; this version reads format {FORMAT}. "
            "Resume with the version that wrote it"
        )
    return validated(Manifest, content, MANIFEST_NAME)


def read_json(path: Path) -> Any:
    """Read a JSON file of a checkpoint.

    Raises:
        DamagedCheckpoint: It is missing, or no JSON.
        CheckpointError: It may not be read.
    """
    try:
        return json.loads(path.read_bytes())
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; give this user access") from error
    except OSError as error:
        raise DamagedCheckpoint(f"{path.name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path.name} is no JSON: {error}") from error


def validated(model: type[_Model], content: Any, name: str) -> _Model:
    """Return the content of a file as `model`.

    Raises:
        DamagedCheckpoint: It is something else.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise DamagedCheckpoint(f"{name} is damaged: {where}: {first['msg']}") from error


def verify_files(directory: Path) -> Manifest:
    """Read all of a checkpoint and compare it with its manifest.

    Raises:
        DamagedCheckpoint: A file is missing, or is not what was written; the message names it.
        CheckpointError: See `read_manifest`; or a file may not be read.
    """
    manifest = read_manifest(directory)
    try:
        # All sizes first: that what was cut off is found without reading gigabytes.
        sizes = {name: (directory / name).stat().st_size for name in manifest.files}
        whole = all(sizes[name] == record.size for name, record in manifest.files.items())
        digests = _digests(directory, manifest.files) if whole else {}
    except PermissionError as error:
        raise CheckpointError(
            f"{error.filename} cannot be read: {error.strerror}; give this user access"
        ) from error
    except OSError as error:
        name = os.path.relpath(error.filename, directory) if error.filename else "a file"
        raise DamagedCheckpoint(f"{name} cannot be read: {error.strerror}") from error
    for name, record in manifest.files.items():
        if sizes[name] != record.size:
            raise DamagedCheckpoint(f"{name} has {sizes[name]} bytes, {record.size} were written")
        if whole and digests[name] != record.sha256:
            raise DamagedCheckpoint(f"{name} is not what was written: its checksum differs")
    return manifest


def unnamed_files(directory: Path, manifest: Manifest) -> list[str]:
    """Files that lie in a checkpoint though its manifest does not name them."""
    return [name for name in _files_below(directory) if name not in manifest.files]


def forget_cached_pages(directory: Path) -> None:
    """Let the system drop its copies of the files below, so that who reads next asks the disk.

    A hint that only some systems know, and only for what has been flushed; elsewhere nothing happens.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    for name in _files_below(directory):
        descriptor = os.open(directory / name, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a file system without the hint
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _files_below(directory: Path) -> list[str]:
    found = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in found if name != MANIFEST_NAME)


def _digests(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files, several at a time."""
    ordered = list(names)
    with ThreadPoolExecutor(_HASHING_THREADS, thread_name_prefix="checksum") as pool:
        return dict(zip(ordered, pool.map(lambda name: _digest(directory / name), ordered), strict=True))


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        error.filename = error.filename or path  # a failing read does not say what it read
        raise


def _checksum(content: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

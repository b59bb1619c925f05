"""A directory that appears under its name whole, or not at all.

Everything is written into a hidden directory beside the target, flushed to the disk file by file (unless
that is not wanted), and then renamed. A process that dies in between leaves only the hidden directory,
which the next writer of the same target removes. There may be one writer for a target at a time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PARTIAL = ".partial-"
_RETIRED = ".retired-"


@contextlib.contextmanager
def atomic_directory(path: Path, *, replace: bool = False, durable: bool = True) -> Iterator[Path]:
    """Yield an empty directory to fill; on leaving without an error it becomes `path`.

    Args:
        path: The final name. Its parents are created.
        replace: Put the new directory in the place of an existing one. For the instant between two
            renames `path` does not exist; it never holds a mixture.
        durable: Flush everything to the disk first, so that a power cut cannot leave an empty file under
            the final name. Off for what is written anew after a crash anyway.

    Raises:
        FileExistsError: `path` exists and `replace` is false.
        OSError: The file system refused, for instance because it is full. `path` is then as it was.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    if path.exists() and not replace:
        raise FileExistsError(f"{path} exists already; remove it or choose another name")
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}{_PARTIAL}", dir=path.parent))
    try:
        partial.chmod(0o755)  # mkdtemp makes it private, but a server under another user has to read it
        yield partial
        if durable:
            _flush_tree(partial)
        _move_into_place(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def remove_leftovers(path: Path) -> None:
    """Remove what writers of `path` that died have left beside it; `path` itself stays."""
    for mark in (_PARTIAL, _RETIRED):
        for leftover in path.parent.glob(f".{path.name}{mark}*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _move_into_place(partial: Path, path: Path) -> None:
    retired = None
    if path.exists():  # a directory cannot be renamed over one that is not empty
        retired = path.with_name(f".{path.name}{_RETIRED}{os.getpid()}")
        path.rename(retired)
    try:
        partial.rename(path)
    except OSError:
        if retired is not None:
            retired.rename(path)
        raise
    _flush(path.parent)
    if retired is not None:
        shutil.rmtree(retired, ignore_errors=True)


def _flush_tree(root: Path) -> None:
    for directory, _, files in os.walk(root):
        for name in files:
            _flush(Path(directory) / name)
        _flush(Path(directory))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

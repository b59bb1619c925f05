"""A directory that appears under its name whole, or not at all.

Everything is written into a hidden directory beside the target, flushed to the disk file by file (unless
that is not wanted), and then renamed. A process that dies in between leaves only hidden directories:

- `.<name>.partial-*`: not written to its end;
- `.<name>.retired-*`: whole, moved out of the way by a writer that was about to replace it;
- `.<name>.deleted-*`: on its way out.

The next writer of the same target puts them in order. There may be one writer for a target at a time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from atropos_client.private_files import PRIVATE_DIRECTORY, set_modes

_PARTIAL = ".partial-"
_RETIRED = ".retired-"
_DELETED = ".deleted-"
_MARKS = (_PARTIAL, _RETIRED, _DELETED)


@contextlib.contextmanager
def atomic_directory(
    path: Path,
    *,
    replace: bool = False,
    durable: bool = True,
    mode: int = PRIVATE_DIRECTORY,
    verify: Callable[[Path], object] = lambda _: None,
) -> Iterator[Path]:
    """Yield an empty directory to fill; on leaving without an error it becomes `path`.

    Args:
        path: The final name. Its parents are created.
        replace: Put the new directory in the place of an existing one. For the instant between two
            renames `path` does not exist; it never holds a mixture. After a crash in that instant
            `restore_replaced` brings the old one back.
        durable: Flush everything to the disk first, so that a power cut cannot leave an empty file under
            the final name. Off for what is written anew after a crash anyway.
        mode: Permissions of the directory and of those in it; files get the same without the right to enter.
            Until all of it is written nobody else can look inside, whatever the mode.
        verify: Looks at the directory when it is on the disk, before it gets its name; what it raises
            keeps it from getting it.

    Raises:
        FileExistsError: `path` exists and `replace` is false.
        OSError: The file system refused, for instance because it is full. `path` is then as it was.
    """
    path = path.absolute()
    path.parent.mkdir(mode=PRIVATE_DIRECTORY, parents=True, exist_ok=True)
    if replace:
        restore_replaced(path)
    remove_leftovers(path)
    if path.exists() and not replace:
        raise FileExistsError(f"{path} exists already; remove it or choose another name")
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}{_PARTIAL}", dir=path.parent))
    try:
        yield partial  # mkdtemp has made it private
        set_modes(partial, mode)
        if durable:
            _flush_tree(partial)
        verify(partial)
        _move_into_place(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def restore_replaced(path: Path) -> bool:
    """Bring `path` back if a writer died after moving it out of the way and before replacing it.

    Returns:
        Whether that had happened.
    """
    if path.exists():
        return False
    retired = sorted(path.parent.glob(f".{path.name}{_RETIRED}*"))
    if not retired:
        return False
    retired[-1].rename(path)
    _flush(path.parent)
    return True


def remove_leftovers(path: Path) -> None:
    """Remove what writers of `path` that died have left beside it; `path` itself stays."""
    for mark in _MARKS:
        for leftover in path.parent.glob(f".{path.name}{mark}*"):
            shutil.rmtree(leftover, ignore_errors=True)


def name_of_leftover(path: Path) -> str | None:
    """The name that a hidden directory was to have, or had; None if no writer here made it."""
    for mark in _MARKS:
        name, found, _ = path.name.removeprefix(".").rpartition(mark)
        if found and path.name.startswith("."):
            return name
    return None


def remove_directory(path: Path) -> None:
    """Delete a directory; a crash leaves all of it under its name, or nothing.

    Raises:
        OSError: The file system refused; `path` is still whole. What cannot be deleted after it has lost
            its name is left for `remove_leftovers`.
    """
    deleted = path.with_name(f".{name_of_leftover(path) or path.name}{_DELETED}{os.getpid()}")
    shutil.rmtree(deleted, ignore_errors=True)  # of an earlier process with our number
    path.rename(deleted)
    _flush(path.parent)
    shutil.rmtree(deleted, ignore_errors=True)


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
        with contextlib.suppress(OSError):  # the new one stands; the next writer tries again
            remove_directory(retired)  # not file by file: what is marked as retired has to be whole


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

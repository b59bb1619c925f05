"""Files and directories of a run that only its own user may read.

Rollouts, rewards and weights are often secret, and a run directory may lie on a machine that others use. What
is made here is private whatever the umask says; what an earlier run left open is closed. Nothing follows a
symbolic link that somebody else has put in its place.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final, Literal

logger = logging.getLogger(__name__)

PRIVATE_DIRECTORY: Final = 0o700
PRIVATE_FILE: Final = 0o600
_OTHERS: Final = 0o077


@contextmanager
def private_umask() -> Iterator[None]:
    """Let everything that is made inside, by libraries and child processes too, be private."""
    before = os.umask(_OTHERS)
    try:
        yield
    finally:
        os.umask(before)


def make_private_directory(path: Path) -> None:
    """Make a directory for one user alone, or take the rights of others from the one that is there.

    Raises:
        PermissionError: It is a symbolic link that belongs to somebody else.
        OSError: It cannot be made, or is no directory.
    """
    path.parent.mkdir(mode=PRIVATE_DIRECTORY, parents=True, exist_ok=True)
    _refuse_link_of_others(path)
    with suppress(FileExistsError):
        path.mkdir(mode=PRIVATE_DIRECTORY)
        return
    found = path.stat().st_mode
    if not stat.S_ISDIR(found):
        raise NotADirectoryError(f"{path} is in the way: it is no directory")
    if found & _OTHERS:
        _change_mode(path, stat.S_IMODE(found) & ~_OTHERS)


def make_run_directory(path: Path, *, mode: int = PRIVATE_DIRECTORY) -> None:
    """Make the directory that a user named, or see that not everybody may write to the one that is there.

    Who may write to a directory can put other files in the place of those in it.

    Args:
        path: Its parents are made as well.
        mode: Of a new one.
    """
    if not path.is_dir():
        path.mkdir(mode=PRIVATE_DIRECTORY, parents=True, exist_ok=True)
        path.chmod(mode)  # mkdir leaves out what the umask says
        return
    found = path.stat()
    if not found.st_mode & stat.S_IWOTH:
        return
    if found.st_uid == os.geteuid() and not found.st_mode & stat.S_ISVTX:  # not /tmp, even as root
        logger.warning("Everybody could write to %s; now only its owner and group can.", path)
        _change_mode(path, stat.S_IMODE(found.st_mode) & ~stat.S_IWOTH)
    else:
        logger.warning(
            "Everybody can write to %s, and could put other checkpoints in the place of this run's: use a "
            "directory of your own.",
            path,
        )


@contextmanager
def open_private(path: Path, mode: Literal["w", "a", "wb", "ab"]) -> Iterator[IO[Any]]:
    """Open a file for writing that only its owner may read; one that is there loses the rights of others.

    Raises:
        PermissionError: It is a symbolic link.
        OSError: It cannot be written, or is no ordinary file.
    """

    def opener(name: str, flags: int) -> int:
        if os.path.islink(name):  # noqa: PTH114 - for the message; O_NOFOLLOW is what holds
            raise PermissionError(f"{name} is a symbolic link; it is not followed")
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, PRIVATE_FILE)

    encoding = None if "b" in mode else "utf-8"
    with open(path, mode, encoding=encoding, opener=opener) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise PermissionError(f"{path} is in the way: it is no ordinary file")
        if found.st_mode & _OTHERS:
            _change_mode(path, stat.S_IMODE(found.st_mode) & ~_OTHERS)
        yield file


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, in the place of one that may be there."""
    with open_private(path, "wb") as file:
        file.write(content)


def replace_private(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Write a file as `write_private` does, whole or not at all: a reader finds the one before, or this one.

    Args:
        path: The file.
        content: All of it.
        durable: Flush it to the disk first, so that a power cut cannot leave an empty one.
    """
    partial = path.with_name(f".{path.name}.partial")
    with open_private(partial, "wb") as file:
        file.write(content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    partial.replace(path)


def set_modes(root: Path, mode: int) -> None:
    """Give a directory and all directories below it `mode`, and files the same without the right to enter."""
    for directory, _, files in os.walk(root):
        for name in files:
            (Path(directory) / name).chmod(mode & 0o666)
        Path(directory).chmod(mode)


def _change_mode(path: Path, mode: int) -> None:
    try:
        path.chmod(mode)
    except OSError as error:  # another user's, or a file system without permissions
        logger.warning("%s can be read by others and that cannot be changed: %s", path, error.strerror)


def _refuse_link_of_others(path: Path) -> None:
    """As the kernel does in directories like /tmp; our own links, to a larger disk say, are followed."""
    with suppress(FileNotFoundError):
        found = path.lstat()
        if stat.S_ISLNK(found.st_mode) and found.st_uid not in (0, os.geteuid()):
            raise PermissionError(
                f"{path} is a symbolic link that user {found.st_uid} has put there; it is not followed"
            )

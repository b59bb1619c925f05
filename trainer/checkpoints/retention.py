"""The checkpoints of one run: which is used, which are kept, which go.

::

    checkpoints/
    ├── step-000100/          kept because of checkpoint.keep_every
    ├── step-000140/          the newest ones: checkpoint.keep
    ├── step-000150/
    ├── step-000160.damaged/  found damaged at a start; kept for inspection, never used or counted
    └── .step-000170.*        of a writer that died; the next start puts it in order
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.checkpoints.manifest import unnamed_files
from trainer.errors import CheckpointError, DamagedCheckpoint
from trainer.export.atomic_directory import (
    name_of_leftover,
    remove_directory,
    remove_leftovers,
    restore_replaced,
)

if TYPE_CHECKING:  # it brings torch, for which those who only list or read manifests need not wait
    from trainer.checkpoints.format import Checkpoint

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{6,})")
_DAMAGED_NAME = re.compile(r"step-\d{6,}\.damaged(-\d+)?")


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return directory / f"step-{step:06d}"


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(_matching(directory, _NAME), key=_step_of)


def recover_checkpoints(directory: Path) -> None:
    """Put in order what a process that died has left; only while nobody writes there.

    A checkpoint that was about to be replaced gets its name back, everything unfinished is removed.
    """
    if not directory.is_dir():
        return
    names = {name_of_leftover(path) for path in directory.iterdir()}
    for name in sorted(name for name in names if name is not None and _NAME.fullmatch(name)):
        path = directory / name
        if restore_replaced(path):
            logger.warning("Restored checkpoint %s, which a process that died was replacing", path)
        remove_leftovers(path)


def find_newest_whole(
    directory: Path, read: Callable[[Path], Checkpoint]
) -> tuple[Checkpoint | None, dict[Path, DamagedCheckpoint]]:
    """Read checkpoints from the newest on until one is whole; changes nothing.

    Args:
        directory: The run's checkpoints.
        read: How to read one, e.g. `verify_checkpoint`.

    Returns:
        The checkpoint, None if there are none at all; and the newer ones, with what is wrong with them.

    Raises:
        CheckpointError: All are damaged; or one is whole but of a format that this version does not read, or
            may not be read.
    """
    damaged: dict[Path, DamagedCheckpoint] = {}
    for path in reversed(list_checkpoints(directory)):
        try:
            return read(path), damaged
        except DamagedCheckpoint as error:
            damaged[path] = error
    found = [f"{path.name}: {error}" for path, error in damaged.items()]
    found += [f"{path.name}: was found damaged earlier" for path in _matching(directory, _DAMAGED_NAME)]
    if found:
        raise CheckpointError(
            f"no checkpoint in {directory} is whole. " + "; ".join(found) + ". Put a whole copy there, or "
            "start anew with another train.output_dir"
        )
    return None, damaged


def set_aside_damaged(damaged: Mapping[Path, DamagedCheckpoint], *, instead: Checkpoint) -> None:
    """Rename damaged checkpoints to `<name>.damaged`, with a warning that says what is wrong.

    Raises:
        CheckpointError: One cannot be renamed.
    """
    for path, error in damaged.items():
        logger.warning("Checkpoint %s is damaged: %s", path, error)
        _set_aside(path, instead=instead.path)
    _warn_of_unknown_files(instead)


def prune_checkpoints(directory: Path, *, keep: int, keep_every: int | None = None) -> None:
    """Delete checkpoints that need not be kept; one that cannot be deleted is logged and stays.

    Args:
        directory: The run's checkpoints.
        keep: So many of the newest stay.
        keep_every: Those of steps that are multiples of it stay as well, step 0 excepted. None: no others.
    """
    for path in list_checkpoints(directory)[:-keep]:
        step = _step_of(path)
        if keep_every is not None and step and step % keep_every == 0:
            continue
        try:
            remove_directory(path)
        except OSError as error:
            logger.warning("Old checkpoint %s stays: %s", path, error)
        else:
            logger.info("Deleted old checkpoint %s", path)


def _matching(directory: Path, name: re.Pattern[str]) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if name.fullmatch(path.name))


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _set_aside(path: Path, *, instead: Path) -> None:
    aside = path.with_name(f"{path.name}.damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    try:
        path.rename(aside)
    except OSError as error:
        raise CheckpointError(
            f"{path} is damaged and cannot be renamed: {error}; move it away, and the run goes on from "
            f"{instead.name}"
        ) from error
    logger.warning("Kept the damaged one as %s; going on from the one before, %s", aside, instead)


def _warn_of_unknown_files(checkpoint: Checkpoint) -> None:
    if extra := unnamed_files(checkpoint.path, checkpoint.manifest):
        logger.warning(
            "Checkpoint %s holds files that were not written with it, first: %s", checkpoint.path, extra[0]
        )

"""An atomic directory that several processes fill, each with files of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.errors import CheckpointError
from trainer.export.atomic_directory import atomic_directory
from trainer.model.sharding import Spread


@contextlib.contextmanager
def shared_directory(path: Path, spread: Spread, **options: Any) -> Iterator[Path]:
    """Yield an empty directory, the same on every process; on leaving without an error it becomes `path`.

    All processes enter it where weights are spread over them, and process 0 gives it its name when all have
    filled it. What fails on one fails on all, and none waits for another. Where each has whole weights, it is
    `atomic_directory`, for the process that writes.

    Args:
        path: The final name, on a file system that the processes share.
        spread: How weights are spread.
        options: See `atomic_directory`.

    Raises:
        CheckpointError: Another process could not do its part.
        FileExistsError, OSError: See `atomic_directory`.
    """
    if not spread.sharded:
        with atomic_directory(path, **options) as directory:
            yield directory
        return
    failure: OSError | None = None
    with contextlib.ExitStack() as process_0:
        made = ""
        if spread.rank == 0:
            try:
                made = str(process_0.enter_context(atomic_directory(path, **options)))
            except OSError as error:
                failure = error
        with failing_together(spread, path):
            directory = Path(spread.text_of_process_0(made))
            if failure is not None:
                raise failure
        with failing_together(spread, path):
            yield directory
        with failing_together(spread, path):
            process_0.close()  # flushed, verified and renamed


@contextlib.contextmanager
def failing_together(spread: Spread, path: Path) -> Iterator[None]:
    """On leaving, wait for the other processes where weights are spread over them; if one failed, all do.

    That goes for what a disk refuses, after the last collective inside. Any other failure is raised at once:
    the others may wait inside for this process, and meet an error when it leaves.

    Args:
        spread: How weights are spread.
        path: What is being written, for the message.

    Raises:
        CheckpointError: Another process failed.
    """
    failure: OSError | None = None
    try:
        yield
    except OSError as error:  # raised again when the others know
        failure = error
    failed = spread.any(failure is not None)
    if failure is not None:
        raise failure
    if failed:
        raise CheckpointError(f"another process could not write its part of {path}; its message says why")

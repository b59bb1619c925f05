"""Writers of a directory that are killed at their n-th file system call or flush; run by its test.

`python -m tests.trainer.directory_crashes DIRECTORY new|replace`. One line a child: its exit status, and what
the directory holds afterwards.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.export.atomic_directory import atomic_directory

EVENTS = ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "os.listdir", "os.scandir", "os.chmod")


def write(path: Path, content: str, *, replace: bool) -> None:
    """Write two files, one of them further down."""
    with atomic_directory(path, replace=replace) as directory:
        (directory / "config.json").write_text(content)
        (directory / "weights").mkdir()
        (directory / "weights/model.safetensors").write_text(content)


def kill_at(moment: int, counts: Callable[[str, tuple[Any, ...]], bool]) -> None:
    """Have this process kill itself at its n-th event of Python's audit that counts, or flush to the disk."""
    seen = 0

    def count(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(lambda event, arguments: count() if counts(event, arguments) else None)
    # Only that it is called matters: the process is killed, not the machine.
    os.fsync = count  # type: ignore[assignment]


def main(root: Path, mode: str) -> None:
    """One child a moment, until one lives to its end."""
    path = root / "out"
    write(path, "old", replace=False)
    status = -1
    for moment in range(1, 200):
        if mode == "new":
            shutil.rmtree(path, ignore_errors=True)
        child = os.fork()
        if child == 0:
            kill_at(moment, lambda event, _: event in EVENTS)
            write(path, "new", replace=mode == "replace")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        held = sorted(file.read_text() for file in path.rglob("*") if file.is_file())
        sys.stdout.write(f"{status} {','.join(held) or 'absent'}\n")
        if status == 0:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

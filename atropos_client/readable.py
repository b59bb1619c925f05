"""Names the file that permissions keep from being read.

Libraries that load models look for files by several names and take one that they may not open for one that is
not there: they go on without it, or say "no such file". Asked first, the kernel says which file it is.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path


def require_readable(path: str | Path) -> None:
    """Raise unless everything that lies directly in a directory, or a file, may be read.

    What is not there at all is left to the caller: a name may be a hub id. Hidden files and directories
    below belong to no model that is read from `path`.

    Raises:
        PermissionError: Says which file or directory it is, its mode and owner, and who asks.
    """
    place = Path(path).absolute()
    for needed, access in _needed(place):
        if os.access(needed, access, effective_ids=os.access in os.supports_effective_ids):
            continue
        if needed.exists() and (
            needed.is_dir() or access == os.R_OK
        ):  # else it is a file in a directory's place
            raise PermissionError(errno.EACCES, _reason(needed, access), str(needed))
        return


def why_not_there(path: str | Path) -> str:
    """Say why nothing is found at a path: it does not exist, or it is a link that leads nowhere."""
    place = Path(path)
    if not place.is_symlink():
        return "it does not exist"
    try:
        place.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "it is a symbolic link that leads in a circle"
    return f"it is a symbolic link to {place.readlink()}, which does not exist"


def _needed(path: Path) -> Iterator[tuple[Path, int]]:
    """Yield everything that reading `path` has to pass, from the root, with the right that it takes."""
    real = Path(os.path.realpath(path))
    for directory in (*reversed(path.parents), *reversed(real.parents)):
        yield directory, os.X_OK
    if not real.is_dir():
        yield real, os.R_OK
        return
    yield real, os.R_OK | os.X_OK
    for entry in sorted(real.iterdir()):
        if not entry.name.startswith(".") and not entry.is_dir() and entry.exists():
            yield entry, os.R_OK


def _reason(path: Path, access: int) -> str:
    found = path.stat()
    what = "entered" if access == os.X_OK else "read"
    return (
        f"Permission denied: it cannot be {what} by user {os.geteuid()} "
        f"(mode {stat.S_IMODE(found.st_mode):04o}, owner {found.st_uid})"
    )

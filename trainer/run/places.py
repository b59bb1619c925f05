"""Names the places in a run's directory, and refuses what is in their way before anything is written."""

from __future__ import annotations

import os
import stat
from itertools import chain
from pathlib import Path
from typing import Final

from atropos_client.readable import why_not_there
from trainer.config import TrainerConfig
from trainer.errors import ConfigurationError

_DIRECTORIES: Final = ("", "checkpoints", "journal", "set_aside", "final")
_FILES: Final = ("metrics.jsonl",)


def checkpoint_directory(config: TrainerConfig) -> Path:
    """Where the run's checkpoints lie."""
    return config.train.output_dir / "checkpoints"


def journal_directory(config: TrainerConfig) -> Path:
    """Where the run's journal lies, and its lock."""
    return config.train.output_dir / "journal"


def publish_directory(config: TrainerConfig) -> Path:
    """Where published versions lie."""
    return config.publish.directory or config.train.output_dir / "published"


def require_places(config: TrainerConfig) -> None:
    """See that what the run writes can be written where it belongs; changes nothing.

    Raises:
        ConfigurationError: It cannot; the message names what is in the way.
    """
    output = config.train.output_dir
    directories = (_in_the_way_of_directory(output / name) for name in _DIRECTORIES)
    files = (_in_the_way_of_file(output / name) for name in _FILES)
    found = next(filter(None, chain(directories, files)), None)
    if found is not None:
        raise ConfigurationError(f"train.output_dir {output} cannot be used: {found}")


def _in_the_way_of_directory(path: Path) -> str | None:
    for existing in (path, *path.absolute().parents):
        try:
            existing.lstat()
            if not existing.exists():
                return f"{existing} is in the way: {why_not_there(existing)}"
            if not existing.is_dir():
                return f"{existing} is in the way: it is no directory; choose another, or move it away"
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            return f"{existing}: {error.strerror}; choose another place"
        return _denied(existing, os.W_OK | os.X_OK)
    return None


def _in_the_way_of_file(path: Path) -> str | None:
    if path.is_symlink():
        return f"{path} is in the way: it is a symbolic link, which is not followed"
    if not path.exists():
        return None
    if not path.is_file():
        kind = "it is a directory" if path.is_dir() else "it is no ordinary file"
        return f"{path} is in the way: {kind}; move it away"
    return _denied(path, os.R_OK | os.W_OK)


def _denied(path: Path, access: int) -> str | None:
    """Why this user has no such access; None if there is."""
    if os.access(path, access, effective_ids=os.access in os.supports_effective_ids):
        return None
    found = path.stat()
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        return f"{path} lies on a file system that is read-only; choose another place"
    return (
        f"{path}: Permission denied: user {os.geteuid()} cannot write there (mode "
        f"{stat.S_IMODE(found.st_mode):04o}, owner {found.st_uid}); choose another place, or give it access"
    )

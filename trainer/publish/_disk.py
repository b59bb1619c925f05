"""Weights by way of a directory that the trainer writes and the servers read.

`<directory>/v000003` holds version 3: an ordinary Hugging Face directory that appears whole or not at all.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from trainer.atomic_directory import remove_leftovers
from trainer.errors import CheckpointError
from trainer.publish._protocol import InferenceServer, StagedWeights
from trainer.publish.errors import StagingFailed

logger = logging.getLogger(__name__)

_VERSION_NAME = re.compile(r"v(\d{6,})")


class DiskTransport:
    """Stages each version as a directory on a file system that the servers see under the same path.

    Args:
        directory: Where the versions go; one trainer at a time owns it.
        write: Writes the current weights as the directory it is given, whole or not at all;
            `trainer.model_directory.write_model_directory` does.
        keep: Newest versions that stay.
    """

    def __init__(self, directory: Path, write: Callable[[Path], None], *, keep: int) -> None:
        self._directory = directory.absolute()
        self._write = write
        self._keep = keep
        self._written: set[int] = set()

    def stage(self, version: int) -> StagedWeights:
        """Write a version, once: a second call for the same version finds it.

        A directory that an earlier run left under this version's name is replaced: after a resume from a
        checkpoint the same number can stand for other weights.

        Raises:
            StagingFailed: The file system refused, or the model cannot be written.
        """
        path = self._directory / version_name(version)
        if version not in self._written or not path.is_dir():
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                if path.exists():
                    logger.warning("replacing %s, which an earlier run left there", path)
                    shutil.rmtree(path)
                self._write(path)
            except (OSError, CheckpointError) as error:
                raise StagingFailed(f"version {version} could not be written to {path}: {error}") from error
            self._written.add(version)
        return StagedWeights(version=version, path=path, dtype=_stated_dtype(path))

    def load(self, server: InferenceServer, staged: StagedWeights) -> None:
        """Let the server read the directory."""
        server.load_directory(staged)

    def prune(self, served: int) -> None:
        """Delete all but the newest versions up to `served`, which the servers hold.

        Higher versions that this process has not written are from an earlier run that went further; they
        go as well. A version that cannot be deleted costs space and nothing else, so it is logged.
        """
        versions = staged_versions(self._directory)
        newest = sorted((version for version in versions if version <= served), reverse=True)[: self._keep]
        ahead = {version for version in self._written if version > served}
        for version in versions - set(newest) - ahead:
            path = self._directory / version_name(version)
            try:
                shutil.rmtree(path)
            except OSError as error:
                logger.warning("old weights stay on disk: %s: %s", path, error)
            self._written.discard(version)
            remove_leftovers(path)


def version_name(version: int) -> str:
    """The directory name of a version: `v000003`."""
    return f"v{version:06d}"


def staged_versions(directory: Path) -> set[int]:
    """Versions that lie complete in a directory."""
    if not directory.is_dir():
        return set()
    names = (entry.name for entry in directory.iterdir() if entry.is_dir())
    return {int(match[1]) for name in names if (match := _VERSION_NAME.fullmatch(name))}


def _stated_dtype(path: Path) -> str | None:
    """The type that the configuration beside the weights names."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StagingFailed(f"{path} has no readable config.json: {error}") from error
    dtype: str | None = config.get("dtype") or config.get("torch_dtype")
    return dtype

"""Publishes weights through a directory that the trainer writes and the servers read.

`<directory>/v000003` holds version 3: an ordinary Hugging Face directory that appears whole or not at all.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from atropos_client.private_files import PRIVATE_DIRECTORY, make_run_directory
from trainer.errors import CheckpointError
from trainer.export.atomic_directory import remove_leftovers
from trainer.publish.errors import Phase, StagingFailed
from trainer.publish.interfaces import InferenceServer, StagedWeights, WeightTransport

logger = logging.getLogger(__name__)

_VERSION_NAME = re.compile(r"v(\d{6,})")


class DiskTransport(WeightTransport):
    """Stages each version as a directory on a file system that the servers see under the same path.

    Args:
        directory: Where the versions go; one trainer at a time owns it.
        capture: Copies the current weights and returns a function that writes the copy as the directory
            that it is given, whole or not at all (`trainer.export.hf_model.capture_model`).
        keep: Newest versions that stay.
        mode: Permissions of `directory`, if it has to be made.
    """

    overlaps = True

    def __init__(
        self,
        directory: Path,
        capture: Callable[[], Callable[[Path], object]],
        *,
        keep: int,
        mode: int = PRIVATE_DIRECTORY,
    ) -> None:
        self._directory = directory.absolute()
        self._capture = capture
        self._keep = keep
        self._mode = mode
        self._written: set[int] = set()

    def capture(self, version: int) -> Callable[[], StagedWeights]:
        """Copy the weights; the returned function writes them, once for each version.

        A directory that an earlier run left under this version's name is replaced: after a resume from a
        checkpoint the same number can stand for other weights.

        Raises:
            StagingFailed: The weights cannot be read; or, later, the file system refused.
        """
        path = self._directory / version_name(version)
        if version in self._written and path.is_dir():
            return lambda: self._staged(version, path)
        try:
            write = self._capture()
        except CheckpointError as error:
            raise StagingFailed(f"version {version} cannot be published: {error}") from error
        return lambda: self._write(version, path, write)

    def load(self, server: InferenceServer, staged: StagedWeights) -> None:
        """Let the server read the directory."""
        if staged.path is None:
            raise server.failure(
                Phase.LOAD, "this version was staged as an adapter only; the next one is a whole model too"
            )
        server.load_directory(staged.path, staged.version)

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

    def _write(self, version: int, path: Path, write: Callable[[Path], object]) -> StagedWeights:
        try:
            make_run_directory(self._directory, mode=self._mode)
            if path.exists():
                logger.warning("replacing %s, which an earlier run left there", path)
                shutil.rmtree(path)
            write(path)
        except (OSError, CheckpointError) as error:
            raise StagingFailed(f"version {version} could not be written to {path}: {error}") from error
        self._written.add(version)
        return self._staged(version, path)

    def _staged(self, version: int, path: Path) -> StagedWeights:
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        return StagedWeights(version=version, path=path, dtype=_stated_dtype(path), weight_bytes=size)


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

"""Adapters instead of whole models: small files, loaded beside what is served, under names of their own.

    <directory>/<run>-v000003   version 3: a PEFT directory that appears whole or not at all
    policy-<run>-v000003        the name under which servers know it; never used twice

`<run>` is random for each process. A name that is used again could get back old cache blocks, and a directory
that changes its content could be read again for requests that began with the old one.

At a server: load -> prove, under the adapter's own name -> make it the current one -> forget older ones.
Nothing is paused: environments sample from the version before until the new one is proven, and what they have
begun with an adapter they end with it. Servers that take no adapters get whole models, from a transport that
can.
"""

from __future__ import annotations

import logging
import re
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from atropos_client.private_files import PRIVATE_DIRECTORY, make_run_directory
from trainer.errors import CheckpointError
from trainer.export.atomic_directory import remove_leftovers
from trainer.export.peft_adapter import CapturedAdapter
from trainer.publish.engines.vllm.adapters import AdapterRoutes
from trainer.publish.errors import Phase, ServerFailure, StagingFailed
from trainer.publish.interfaces import InferenceServer, StagedWeights, WeightTransport
from trainer.publish.transports.disk import version_name

logger = logging.getLogger(__name__)

NAME_PREFIX = "policy"

_DIRECTORY = re.compile(r"(?P<run>[0-9a-f]{8})-v(?P<version>\d{6,})")
_NAME = re.compile(rf"{NAME_PREFIX}-(?P<directory>{_DIRECTORY.pattern})(?:-\d+)?")


@dataclass
class _ServerState:
    """Keeps what is known of one server. Written by one thread at a time."""

    adapters: AdapterRoutes
    """The server."""
    version: int | None = None
    """The version loaded last."""
    tries: int = 0
    """Number of times that it was loaded."""
    name: str | None = None
    """The name it was loaded under, the last time."""
    activated: list[str] = field(default_factory=list)
    """The names that were made the current one, oldest first, as far as they are still loaded."""
    held: frozenset[str] | None = None
    """Names whose directories the server may still read; None before the first answer."""


class LoraTransport(WeightTransport):
    """Publishes the adapter's tensors only.

    Args:
        directory: Where the versions go; the servers see it under the same path. One trainer at a time
            owns it.
        capture: Copies the model's adapter (`trainer.export.peft_adapter.capture_adapter`).
        keep: Newest versions that stay, on the disk and on the servers.
        merged: For servers that take no adapters. None: such a server is an error.
    """

    overlaps = True
    pauses = False

    def __init__(
        self,
        directory: Path,
        capture: Callable[[], CapturedAdapter],
        *,
        keep: int,
        merged: WeightTransport | None = None,
        mode: int = PRIVATE_DIRECTORY,
    ) -> None:
        self._directory = directory.absolute()
        self._capture = capture
        self._keep = keep
        self._merged = merged
        self._mode = mode
        self._run = secrets.token_hex(4)
        self._staged: dict[int, StagedWeights] = {}
        self._states: dict[str, _ServerState] = {}
        self._plain: set[str] = set()
        """Servers that take no adapters."""

    def capture(self, version: int) -> Callable[[], StagedWeights]:
        """Copy the adapter, and the merged weights if a server needs them.

        Raises:
            StagingFailed: The model has no adapter, or one that servers do not load; or, later, the file
                system refused.
        """
        stage_merged = self._merged.capture(version) if self._merged and self._plain else None
        captured = None
        if version not in self._staged:
            try:
                captured = self._capture()
            except CheckpointError as error:
                raise StagingFailed(f"version {version} cannot be published: {error}") from error

        def stage() -> StagedWeights:
            if captured is not None:
                self._staged[version] = self._write(version, captured)
            return replace(self._staged[version], path=None if stage_merged is None else stage_merged().path)

        return stage

    def connect(self, server: InferenceServer) -> WeightTransport:
        """Find out whether it takes adapters; one that does not gets whole models.

        Raises:
            ServerFailure: It does not, and there is nothing else for it.
        """
        if isinstance(server, AdapterRoutes) and server.takes_adapters():
            self._plain.discard(server.url)
            self._states.setdefault(server.url, _ServerState(server))
            return self
        if self._merged is None:
            raise server.failure(
                Phase.CONNECT,
                "it takes no adapters, and publish.lora_fallback is refuse",
                remedy="start vLLM with --enable-lora, --max-lora-rank (at least model.lora.rank), "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --middleware atropos_generate.AtroposGenerate; or "
                "set publish.lora_fallback to merged",
            )
        logger.warning("%s gets merged weights, as publish.lora_fallback says", server.url)
        self._plain.add(server.url)
        return self._merged.connect(server)

    def served_name(self, server: InferenceServer) -> str | None:
        """The adapter's name at this server."""
        return self._states[server.url].name

    def load(self, server: InferenceServer, staged: StagedWeights) -> None:
        """Load the adapter under a fresh name."""
        state = self._states[server.url]
        if staged.adapter is None:
            raise server.failure(Phase.LOAD, "this version was not staged as an adapter")
        # Whatever became of a try before this one, its name may have been taken.
        state.tries = state.tries + 1 if state.version == staged.version else 1
        state.version = staged.version
        name = f"{NAME_PREFIX}-{staged.adapter.name}"
        state.name = name if state.tries == 1 else f"{name}-{state.tries}"
        if state.held is not None:
            state.held |= {state.name}
        state.adapters.load_adapter(state.name, staged.adapter)

    def activate(self, server: InferenceServer, staged: StagedWeights) -> None:
        """Make the proven adapter the current one, then forget those before the newest `keep`."""
        state = self._states[server.url]
        current = str(state.name)  # always set: `load` went before
        state.adapters.activate_adapter(current, staged.version)
        server.tag(staged.version)
        known = state.adapters.adapters()
        # Taken before anything is unloaded: afterwards there may still come requests that had been let in.
        # A directory therefore outlives its name by at least one version.
        state.held = frozenset(known)
        before = [name for name in state.activated if name in known and name != current]
        state.activated = [*before, current][-self._keep :]
        for name in sorted(known - set(state.activated)):
            if _NAME.fullmatch(name):  # ours, perhaps from a trainer before us
                _unload(state.adapters, name)

    def is_served(self, server: InferenceServer, staged: StagedWeights) -> bool:
        """Whether the adapter is loaded and the one that environments sample from."""
        state = self._states[server.url]
        if state.name is None or state.version != staged.version:
            return False
        return state.name in state.adapters.adapters() and state.adapters.active_adapter() == state.name

    def prune(self, served: int) -> None:
        """Delete old versions that no request can be sampling from any more.

        vLLM reads an adapter's directory again when it has pushed the adapter out of memory while requests
        still use it; if the directory is gone the engine dies. So one that any server holds stays.
        """
        if self._merged is not None:
            self._merged.prune(served)
        held: set[str] = set()
        for state in [state for url, state in list(self._states.items()) if url not in self._plain]:
            if state.held is None:
                return
            held |= {match["directory"] for name in state.held if (match := _NAME.fullmatch(name))}
        mine = sorted(version for version in self._staged if version <= served)
        kept = {self._name(version) for version in self._staged if version > served}
        kept |= {self._name(version) for version in mine[-self._keep :]}
        for entry in self._entries():
            if entry.name not in held | kept:
                self._delete(entry)

    def close(self, servers: Sequence[InferenceServer]) -> None:
        """Adapters stay loaded, so that environments can go on sampling."""
        if self._merged is not None:
            self._merged.close(servers)

    def _name(self, version: int) -> str:
        """The directory's name."""
        return f"{self._run}-{version_name(version)}"

    def _write(self, version: int, captured: CapturedAdapter) -> StagedWeights:
        path = self._directory / self._name(version)
        try:
            # Not flushed to the disk: after a crash the trainer publishes anew, under another name.
            make_run_directory(self._directory, mode=self._mode)
            captured.write(path, durable=False, mode=self._mode)
        except (OSError, CheckpointError) as error:
            raise StagingFailed(f"version {version} could not be written to {path}: {error}") from error
        return StagedWeights(
            version=version,
            dtype=captured.dtype,
            adapter=path,
            weight_bytes=captured.weight_bytes,
        )

    def _entries(self) -> list[Path]:
        """The directories of all runs."""
        if not self._directory.is_dir():
            return []
        return [entry for entry in self._directory.iterdir() if _DIRECTORY.fullmatch(entry.name)]

    def _delete(self, path: Path) -> None:
        try:
            shutil.rmtree(path)
        except OSError as error:  # it costs space and nothing else
            logger.warning("an old adapter stays on disk: %s: %s", path, error)
        remove_leftovers(path)
        self._staged = {version: staged for version, staged in self._staged.items() if staged.adapter != path}


def _unload(server: AdapterRoutes, name: str) -> None:
    """Forget an adapter; one that stays costs the server some memory and nothing else."""
    try:
        server.unload_adapter(name)
    except ServerFailure as error:
        logger.warning("an old adapter stays loaded: %s", error)

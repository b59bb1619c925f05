"""Publishes only what changed, to vLLM servers whose workers have our extension (`atropos_delta`).

    <directory>/v000004.delta.safetensors   what version 4 changes in the version published before it
    <directory>/v000004.whole.safetensors   all of version 4, written when a server needs it
    <directory>/v000004                     the same for servers without the extension, as `disk` writes it

The trainer keeps a copy of the bits that it published last. A copy of a new version is compared with it and
takes its place, so that a full version can be written at any time. Of weights that are spread over processes
each keeps its own rows; then every version is written, and a full one that a server needs in between is put
together from the files since the last.

At a server: it reads and checks the file while it still serves the old weights, and answers with sums of what
it will then hold, which have to be the trainer's. Only then is it paused, for the writing. A server that does
not hold the version before, or that refuses or fails, gets all of the version instead; one whose weights are
laid out in another way than a checkpoint's gets directories.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from atropos_client.private_files import PRIVATE_DIRECTORY, make_run_directory
from trainer.config import PublishSettings
from trainer.errors import CheckpointError
from trainer.publish.delta.bits import wrapped
from trainer.publish.delta.file_server import FileServer
from trainer.publish.delta.files import (
    Label,
    PublishedFile,
    delta_name,
    read_version,
    whole_name,
    write_file,
)
from trainer.publish.delta.update import Update
from trainer.publish.engines.vllm.routes import VllmRoutes
from trainer.publish.errors import Phase, StagingFailed
from trainer.publish.interfaces import InferenceServer, StagedWeights, WeightTransport
from trainer.publish.transports.disk import DiskTransport

logger = logging.getLogger(__name__)

_FILE = re.compile(r"(\.?)v(\d{6,})\.(delta|whole)\.safetensors(\.partial)?")


@dataclass(frozen=True)
class _Version:
    """What servers may be given of one version."""

    label: Label
    update: Update
    delta: PublishedFile | None


class DeltaTransport(WeightTransport):
    """Publishes deltas; full versions where there is nothing to build on, and now and then.

    Args:
        directory: Where the files go; one trainer at a time owns it.
        take: Takes the live weights, to be compared with those that it took last; gets the version's number.
        write_directory: Writes tensors as an ordinary model directory, for servers without the extension.
        settings: Section `publish` of the configuration.
        mode: Permissions of what is written.
    """

    overlaps = True

    def __init__(
        self,
        directory: Path,
        take: Callable[[int], Update],
        write_directory: Callable[[Path, Iterable[tuple[str, Tensor]]], object],
        settings: PublishSettings,
        *,
        mode: int = PRIVATE_DIRECTORY,
    ) -> None:
        delta = settings.delta
        self._directory = directory.absolute()
        self._take = take
        self._settings = settings
        self._mode = mode
        self._lock = threading.RLock()  # over the snapshot, and what is known of its version
        self._version: _Version | None = None
        self._staged: StagedWeights | None = None
        self._whole: PublishedFile | None = None
        self._since_whole = 0
        self._chain: list[PublishedFile] = []
        """Of spread weights: the last full version's file, and those of what changed since."""
        self._held: dict[str, tuple[int | None, str | None]] = {}
        """Servers whose workers take deltas, with the version and the checksum that they hold."""
        self._chosen: dict[str, PublishedFile] = {}
        """The file that each server is ready to apply."""
        self._disk = DiskTransport(
            directory,
            lambda: lambda path: write_directory(path, self._tensors()),
            keep=settings.keep,
            mode=mode,
        )
        self._files = None
        if delta.port is not None and delta.token is not None:
            token = delta.token.get_secret_value()
            self._files = FileServer(delta.host, delta.port, self._directory, token)
            logger.info("published files are served on %s:%d", delta.host, self._files.port)

    def capture(self, version: int) -> Callable[[], StagedWeights]:
        """Copy the weights; the returned function compares them with those before, and writes what changed.

        Raises:
            StagingFailed: The weights cannot be read; or, later, the file system refused.
        """
        with self._lock:
            staged = self._staged
            if staged is not None and staged.version == version:
                return lambda: staged
            base, chain = self._version, self._chain
            self._staged = self._version = self._whole = None
            self._chain = []
            try:
                update = self._take(version)
            except CheckpointError as error:
                raise StagingFailed(f"version {version} cannot be published: {error}") from error
        return lambda: self._stage(version, base, chain, update)

    def connect(self, server: InferenceServer) -> WeightTransport:
        """Find out whether its workers take deltas; otherwise it gets directories."""
        super().connect(server)
        lacks = "it is no vLLM"
        if isinstance(server, VllmRoutes):
            states = server.delta_states()
            if states is not None:
                held = {(state.version, state.checksum) for state in states}
                self._held[server.url] = held.pop() if len(held) == 1 else (None, None)
                return self
            lacks = "its workers lack --worker-extension-cls atropos_delta.AtroposDelta"
        self._give_directories(server, lacks)
        return self

    def prepare(self, server: InferenceServer, staged: StagedWeights) -> None:
        """Let it read and check what changed; all of the version where that does not do."""
        self._chosen.pop(server.url, None)
        version = self._version_of(server, staged)
        if isinstance(server, VllmRoutes) and server.url in self._held:
            refused = None
            if version.delta is not None:
                refused = self._offer(server, version, version.delta)
                if refused is None:
                    return
                logger.warning("%s gets all of version %d: %s", server.url, staged.version, refused)
            if server.url in self._held:
                refused = self._offer(server, version, self._write_whole(server, staged))
            if refused is None:
                return
            if server.url in self._held:
                self._held[server.url] = None, None
                logger.warning(
                    "%s gets version %d as a directory, and a file again with the next: %s. What to do if it "
                    "cannot read files: let its ATROPOS_DELTA_SOURCE name the published directory or the "
                    "trainer's URL, and its ATROPOS_DELTA_TOKEN be publish.delta.token",
                    server.url,
                    staged.version,
                    refused,
                )
        self._write_directory(server, staged)

    def load(self, server: InferenceServer, staged: StagedWeights) -> None:
        """Let it write what it has checked; all of the version if that fails."""
        chosen = self._chosen.pop(server.url, None)
        if chosen is None or not isinstance(server, VllmRoutes):
            self._disk.load(server, self._write_directory(server, staged))
            return
        version = self._version_of(server, staged)
        self._held[server.url] = None, None
        failed = server.delta_apply(chosen.name)
        if failed is not None and chosen == version.delta:
            logger.warning("%s gets all of version %d: %s", server.url, staged.version, failed)
            whole = self._write_whole(server, staged)
            failed = self._offer(server, version, whole) or server.delta_apply(whole.name)
        if failed is not None:
            raise server.failure(Phase.LOAD, failed)
        self._held[server.url] = staged.version, version.label.checksum

    def prune(self, served: int) -> None:
        """Delete the files of all but the newest versions up to `served`, and of versions of earlier runs."""
        self._disk.prune(served)
        if not self._directory.is_dir():
            return
        files = [(_FILE.fullmatch(file.name), file) for file in self._directory.iterdir()]
        # A later version's file may be half written just now; one of a killed trainer stays so.
        found = [
            (int(name[2]), file)
            for name, file in files
            if name is not None and (not name[1] or int(name[2]) <= served)
        ]
        newest = sorted({version for version, _ in found if version <= served})[-self._settings.keep :]
        with self._lock:
            kept = {*newest, *((self._version.label.version,) if self._version else ())}
            chain = {file.name for file in self._chain}
        for version, file in found:
            if version not in kept and file.name not in chain:
                try:
                    file.unlink(missing_ok=True)
                except OSError as error:
                    logger.warning("an old version stays on disk: %s: %s", file, error)

    def close(self, servers: Sequence[InferenceServer]) -> None:
        """Stop serving files."""
        if self._files is not None:
            self._files.close()

    def _stage(
        self, number: int, base: _Version | None, chain: list[PublishedFile], update: Update
    ) -> StagedWeights:
        with self._lock:
            try:
                update.sum_up()
                make_run_directory(self._directory, mode=self._mode)
                delta = whole = None
                if base is not None and self._may_be_delta(base, chain, update):
                    label = Label(
                        version=number,
                        checksum=update.checksum,
                        base_version=base.label.version,
                        base_checksum=base.label.checksum,
                    )
                    delta = self._write(delta_name(number), label, update, whole=False)
                else:
                    label = Label(version=number, checksum=update.checksum)
                    if update.spread.sharded:  # rows of other processes are not there later
                        whole = self._write(whole_name(number), label, update, whole=True)
            except OSError as error:
                raise StagingFailed(
                    f"version {number} could not be written to {self._directory}: {error}"
                ) from error
            finally:
                update.finish()  # the other processes send their rows to the end
            if update.spread.sharded:
                self._chain = [file for file in (*(chain if delta else ()), delta, whole) if file]
            self._whole = whole
            self._version = _Version(label, update, delta)
            self._since_whole = 0 if delta is None else self._since_whole + 1
            size = update.nbytes if delta is None else delta.size
            self._staged = StagedWeights(version=number, dtype=update.dtype_name, weight_bytes=size)
            return self._staged

    def _may_be_delta(self, base: _Version, chain: list[PublishedFile], update: Update) -> bool:
        if update.first or self._since_whole + 1 >= self._settings.delta.anchor_every:
            return False
        if update.spread.sharded:  # the files since the last full version take no more than another one
            whole_again = sum(file.size for file in chain[1:]) >= update.nbytes
            return bool(chain) and not whole_again and all(map(self._is_there, chain))
        return (base.label.version, base.label.checksum) in self._held.values()

    def _is_there(self, file: PublishedFile) -> bool:
        try:
            return (self._directory / file.name).stat().st_size == file.size
        except OSError:
            return False

    def _write(self, name: str, label: Label, update: Update, *, whole: bool) -> PublishedFile:
        layout = update.choose(whole=whole)
        return write_file(self._directory / name, label, update.shapes, layout, update.parts, mode=self._mode)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The newest version's tensors, one at a time.

        Raises:
            OSError: They cannot be read, or are not what was written.
        """
        if self._version is None:
            return
        update = self._version.update
        if not update.spread.sharded:
            yield from update.held()
            return
        chain = self._chain
        if not chain:
            raise OSError("the files that it is put together from are damaged")
        try:
            yield from read_version(self._directory, chain, update.sums)
        except OSError:
            self._chain = []  # so that the next version is a full one
            raise

    def _version_of(self, server: InferenceServer, staged: StagedWeights) -> _Version:
        """What is known of a version, as long as it is the newest.

        Raises:
            ServerFailure: The training thread is about to publish the next.
        """
        with self._lock:
            version = self._version
            if version is None or version.label.version != staged.version:
                raise server.failure(Phase.LOAD, "the next version is on its way; it gets that one")
            return version

    def _write_whole(self, server: InferenceServer, staged: StagedWeights) -> PublishedFile:
        with self._lock:
            version = self._version_of(server, staged)
            if self._whole is None:
                label = Label(version=staged.version, checksum=version.label.checksum)
                path = self._directory / whole_name(staged.version)
                try:
                    layout = version.update.tensors
                    shapes = {name: tensor.shape for name, tensor in layout.items()}
                    self._whole = write_file(path, label, shapes, layout, self._tensors(), mode=self._mode)
                except OSError as error:
                    raise server.failure(
                        Phase.LOAD,
                        f"{path} could not be written: {error}",
                        remedy="see that the published directory has room, and keeps its files; if they are "
                        "damaged or gone, the next version is a full one, also of a run started again",
                    ) from error
            return self._whole

    def _write_directory(self, server: InferenceServer, staged: StagedWeights) -> StagedWeights:
        with self._lock:
            self._version_of(server, staged)
            try:
                return self._disk.capture(staged.version)()
            except StagingFailed as error:
                raise server.failure(Phase.LOAD, str(error)) from error

    def _give_directories(self, server: InferenceServer, why: str) -> None:
        logger.warning("%s gets full versions as directories: %s", server.url, why)
        self._held.pop(server.url, None)

    def _offer(self, server: VllmRoutes, version: _Version, file: PublishedFile) -> str | None:
        """Let a server check a file; return why it is not to be applied, None if it is.

        One whose weights no file fits gets directories from now on.
        """
        states = server.delta_prepare(file.name, file.sha256, file.size)
        for state in states:
            if state.error is not None:
                if state.unfit:
                    self._give_directories(server, state.error)
                return state.error
        sums = version.update.sums
        for name, tensor in version.update.tensors.items():
            size = torch.Size(tensor.shape).numel()
            held = [state.sums.get(name, (0, 0)) for state in states if state.sums is not None]
            count = sum(each[1] for each in held)
            copies = count // size if size else 0
            if count != copies * size or wrapped(sum(each[0] for each in held)) != wrapped(
                copies * sums[name]
            ):
                return f"with {file.name} it would hold another {name} than the trainer has"
        self._chosen[server.url] = file
        return None

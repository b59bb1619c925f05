"""The processes that train together, and the directory that is theirs alone.

Process 0 holds the lock on the run's directory before anything
in it is touched; the others hear how that went, and see that the directory is the same one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, Self

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import distributed

from atropos_client.journal import LOCK_NAME, Journal, WriterLock
from atropos_client.private_files import PRIVATE_DIRECTORY, make_run_directory
from trainer.config import TrainerConfig, leaves
from trainer.errors import AnotherProcessFailed, ConfigurationError, TrainerError
from trainer.model.collectives import wait
from trainer.model.load import inspect_model
from trainer.model.reference import inspect_reference
from trainer.run.accelerator import PROCESS_GROUP_TIMEOUT, describe_processes, make_accelerator
from trainer.run.peers import Peers
from trainer.run.places import journal_directory, require_places

logger = logging.getLogger(__name__)

_LOCK_PATIENCE_SECONDS: Final = 10.0
"""Beyond `journal.shutdown_timeout`, in which the fetching process of a killed trainer ends its last poll."""

_OWN_SETTINGS: Final[dict[str, Any]] = {"logging": True, "health": True, "train": {"output_dir"}}
"""Those that may differ; a directory that is not shared is found by what is in it."""
_MOST_NAMED: Final = 5

_FAILED: Final = -2

_PLACE: Final = re.compile(r"^\[[^]]*\] ")
"""Where in torch's own source an error came up."""

_LOST: Final = ("connection closed by peer", "connection reset by peer", "gloo", "nccl", "broken pipe")


@dataclass(frozen=True, kw_only=True)
class JoinedRun:
    """This process's place in a run; a context manager that lets go of the directory."""

    accelerator: Accelerator
    control: Any = None
    """Group for what processes tell each other by the CPU. None: the default group does that."""
    peers: Peers | None = None
    """None: there is one process."""
    lock: WriterLock | None = None
    """On the run's directory, on process 0."""

    def share(self) -> Self:
        """Return the same place once more; the directory is free when all of them have let go."""
        return replace(self, lock=self.lock.share() if self.lock is not None else None)

    def release(self) -> None:
        """Let go of the directory, and be heard by the others no more. May be called twice."""
        if self.lock is not None:
            self.lock.release()
        if self.peers is not None:
            self.peers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @contextlib.contextmanager
    def explained_failures(self) -> Iterator[None]:
        """Tell the other processes what ends this one; say who it is where another has ended.

        Raises:
            AnotherProcessFailed: Instead of what torch raised.
        """
        try:
            with translated_peer_failures():
                yield
        except AnotherProcessFailed as error:
            if self.peers is None:
                raise
            raise self.peers.explain(error) from error
        except BaseException as error:
            self.say_end(error)
            raise

    def say_end(self, error: BaseException) -> None:
        """Let the other processes know what ends this one, once."""
        if self.peers is not None and not isinstance(error, AnotherProcessFailed):
            self.peers.say_end(_in_a_line(error))

    def part(self) -> None:
        """Note that this process has left a collective in which others may still wait."""
        if self.peers is not None:
            self.peers.parted = True

    @property
    def parted(self) -> bool:
        """Whether no more can be announced, because others wait elsewhere."""
        return self.peers is not None and self.peers.parted

    @property
    def count(self) -> int:
        """Number of processes that train together."""
        return int(self.accelerator.num_processes)

    def any(self, ours: bool) -> bool:
        """Return whether any process says yes; all have to ask.

        Raises:
            AnotherProcessFailed: One of them is gone.
        """
        if self.count == 1:
            return ours
        votes = torch.tensor([int(ours)])
        with translated_peer_failures():
            wait(distributed.all_reduce(votes, distributed.ReduceOp.MAX, self.control, async_op=True))
        return bool(votes.item())


def join_run(config: TrainerConfig) -> JoinedRun:
    """Find the other processes of the run, and take its directory.

    Raises:
        ConfigurationError: Accelerate was told what this trainer does not do, or the processes that were
            started do not train together, or with other settings, or not in one directory; or something is in
            the way in there.
        JournalLocked: Another run has the directory.
        AnotherProcessFailed: Process 0 met one of these.
    """
    policy = inspect_model(config.model)  # before anything is written
    inspect_reference(config.loss.reference, config.model, config.data, policy)
    accelerator = make_accelerator(config)
    if accelerator.is_main_process:
        logger.info(
            "Training with %s, on %s", describe_processes(accelerator, config.parallel), accelerator.device
        )
    control = None
    if accelerator.num_processes > 1 and distributed.get_backend() != "gloo":
        control = distributed.new_group(backend="gloo", timeout=PROCESS_GROUP_TIMEOUT)
    peers = None
    if accelerator.num_processes > 1:
        peers = Peers(accelerator.process_index, accelerator.num_processes)
    joined = JoinedRun(accelerator=accelerator, control=control, peers=peers)
    with joined.explained_failures():
        try:
            _require_same_settings(config, joined)
            return replace(joined, lock=_take_directory(config, accelerator))
        except BaseException:
            joined.release()
            raise


def _require_same_settings(config: TrainerConfig, joined: JoinedRun) -> None:
    """See that this process has the settings of process 0: each has read its own file and environment.

    Raises:
        ConfigurationError: It has not; the message names them.
        AnotherProcessFailed: Another one has not, or is gone.
    """
    if joined.count == 1:
        return
    ours = config.model_dump_json(exclude=_OWN_SETTINGS)  # secrets are stars in it
    here, there = (dict(leaves(json.loads(text))) for text in (ours, _text_of_process_0(ours, joined)))
    names = [name for name in sorted(here.keys() | there.keys()) if here.get(name) != there.get(name)]
    if not joined.any(bool(names)):
        return
    if not names:
        raise AnotherProcessFailed("another process has other settings; its message names them", told=True)
    told = [f"{name} is {here.get(name)}, there {there.get(name)}" for name in names[:_MOST_NAMED]]
    more = [f"and {len(names) - _MOST_NAMED} more"] if len(names) > _MOST_NAMED else []
    raise ConfigurationError(
        f"process {joined.accelerator.process_index} has other settings than process 0: "
        f"{'; '.join(told + more)}. Give all processes the same file, variables and command line"
    )


def _text_of_process_0(ours: str, joined: JoinedRun) -> str:
    data = torch.tensor(list(ours.encode()), dtype=torch.uint8)
    size = torch.tensor([len(data)])
    wait(distributed.broadcast(size, 0, joined.control, async_op=True))
    if not joined.accelerator.is_main_process:
        data = torch.empty(int(size.item()), dtype=torch.uint8)
    wait(distributed.broadcast(data, 0, joined.control, async_op=True))
    return bytes(data.tolist()).decode()


def _take_directory(config: TrainerConfig, accelerator: Accelerator) -> WriterLock | None:
    if accelerator.num_processes == 1:
        return _lock_directory(config)
    lock: WriterLock | None = None

    def take() -> int:
        nonlocal lock
        lock = _lock_directory(config)
        return _mark(config)

    mark = from_process_0(accelerator, take, failed="could not take the run's directory")
    others = int(mark != _mark(config))
    if int(accelerator.reduce(torch.tensor([others], device=accelerator.device)).item()):
        if lock is not None:
            lock.release()
        raise ConfigurationError(
            f"train.output_dir {config.train.output_dir} is not one directory for all processes"
            f"{': this one does not see what process 0 wrote there' if others else ''}; "
            "several nodes need a file system that they share"
        )
    return lock


def _lock_directory(config: TrainerConfig) -> WriterLock:
    require_places(config)
    # Others may pass through it, but not look into it, where inference servers read what is published below.
    shared = config.publish.readable_by != "owner" and config.publish.directory is None
    make_run_directory(config.train.output_dir, mode=0o711 if shared else PRIVATE_DIRECTORY)
    return Journal.take_lock(
        journal_directory(config), wait=config.journal.shutdown_timeout + _LOCK_PATIENCE_SECONDS
    )


def _mark(config: TrainerConfig) -> int:
    """Checksum of what the lock's file says of its holder: the process, its machine, and since when."""
    try:
        return zlib.crc32((journal_directory(config) / LOCK_NAME).read_bytes())
    except OSError:
        return 0


def from_process_0(accelerator: Accelerator, find: Callable[[], int], *, failed: str) -> int:
    """Let process 0 find a number, not negative but for -1, and return it on all processes.

    Raises:
        AnotherProcessFailed: On the others, if `find` raised; `failed` says in words that it did.
    """
    number = _FAILED
    try:
        if accelerator.is_main_process:
            number = find()
    finally:  # the others must hear of it whatever happened
        told = torch.tensor([number], dtype=torch.int64, device=accelerator.device)
        number = int(broadcast(told).item())
    if number == _FAILED:
        raise AnotherProcessFailed(f"process 0 {failed}; its message says why", told=True)
    return number


@contextlib.contextmanager
def translated_peer_failures() -> Iterator[None]:
    """Say of an error of the connection that another process is gone. The only place that does.

    Raises:
        AnotherProcessFailed: Instead of what torch raised.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).strip().partition(". ")[0].partition("\n")[0]
        lost = isinstance(error, distributed.DistError) or any(word in text.lower() for word in _LOST)
        if not (lost and distributed.is_initialized()):
            raise
        raise AnotherProcessFailed(
            f"another process of the run has ended or cannot be reached ({_PLACE.sub('', text)}); what it "
            "said last, or the launcher's list of exit codes, says why"
        ) from error


def _in_a_line(error: BaseException) -> str:
    first_line = (str(error).strip().splitlines() or ["no message"])[0]
    return first_line if isinstance(error, TrainerError) else f"{type(error).__name__}: {first_line}"

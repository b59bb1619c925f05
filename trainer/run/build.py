"""Builds a trainer with its source and publisher from a configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path

from torch import Tensor

from atropos_client.journal import Journal
from atropos_client.private_files import PRIVATE_DIRECTORY
from trainer.config import PublishSettings, TrainerConfig
from trainer.errors import ConfigurationError
from trainer.export.hf_model import write_model_directory, write_without_copy
from trainer.export.peft_adapter import CapturedAdapter
from trainer.model.weight_requests import WeightRequests
from trainer.monitoring import Progress
from trainer.publish import (
    DeltaTransport,
    DiskTransport,
    InferenceServer,
    LogprobKind,
    LogprobPolicy,
    LoraTransport,
    Probes,
    ProbeScores,
    Publisher,
    SglangRoutes,
    VllmRoutes,
    VllmTransferTransport,
    WeightTransport,
)
from trainer.publish.delta.update import Update
from trainer.run.follower import Follower
from trainer.run.loop import Trainer
from trainer.run.metrics import Row
from trainer.run.optimizer_step import StepRunner
from trainer.run.orders import Order, announce, together
from trainer.run.places import journal_directory, publish_directory
from trainer.run.processes import JoinedRun, translated_peer_failures
from trainer.run.publish_part import PublishPart
from trainer.run.start import Accept, accept_any, accept_journal
from trainer.run.train_state import PreparedRun, prepare_run
from trainer.sources.incoming import BatchSource
from trainer.sources.live import AtroposSource, journal_limits

logger = logging.getLogger(__name__)

PUBLISHED_MODES = {"owner": PRIVATE_DIRECTORY, "group": 0o750, "everyone": 0o755}
"""Permissions of published directories by `publish.readable_by`."""


def build_trainer(
    config: TrainerConfig,
    *,
    source: BatchSource | None = None,
    accept: Accept | None = None,
    joined: JoinedRun | None = None,
    on_row: Callable[[Row], None] | None = None,
    progress: Progress | None = None,
) -> Trainer | Follower:
    """Build this process's part of a run: that of process 0, or of one that follows it.

    Args:
        config: The configuration.
        source: Where batches come from. None: the configured Atropos API, through the journal in the output
            directory unless `journal.enabled` is off.
        accept: Whether the batches of `source` go on from a checkpoint. None: from any.
        joined: This process's place in the run, which stays the caller's. None: find it.
        on_row: Called with every metrics row.
        progress: Where the present phase and how far the run has come are noted.

    Raises:
        ConfigurationError: The model cannot be loaded, or another setting does not fit it.
        CheckpointError: The newest checkpoint cannot be read.
        JournalError: Another run has the directory, or its journal cannot be read or written.
    """
    prepared = prepare_run(config, joined, accept or (accept_journal if source is None else accept_any))
    steps = StepRunner(config, prepared)
    if not prepared.accelerator.is_main_process:
        return Follower(config, prepared, steps, progress=progress)
    trainer: Trainer
    publisher: Publisher | None = None

    def served_version() -> int:
        """Version that environments sampled from when a batch arrived, as far as it is known."""
        return -1 if publisher is None else publisher.sampled_version

    def step() -> int:
        return trainer.step

    with ExitStack() as closed_on_failure:
        closed_on_failure.callback(prepared.joined.release)
        journal = None
        if source is None:
            _warn_of_unknown_ages(config)
            if config.journal.enabled:
                # Under the lock that process 0 holds on the run's directory.
                journal = Journal.open(
                    journal_directory(config),
                    limits=journal_limits(config),
                    lock=prepared.joined.share().lock,
                    accept_loss=config.journal.accept_loss,
                )
                closed_on_failure.enter_context(journal)
            source = AtroposSource(
                config,
                journal,
                after=prepared.state.batches if journal is not None else 0,
                served_version=served_version,
                step=step,
                prepare=steps.prepare,
            )
        publisher = build_publisher(config, prepared, stop_requested=lambda: trainer.save_if_stopping())
        trainer = Trainer(
            config,
            prepared,
            steps,
            source=source,
            ledger=journal,
            publisher=publisher,
            on_row=on_row,
            progress=progress,
        )
        if progress is not None and publisher is not None:
            progress.served_version = lambda: publisher.served_version
        closed_on_failure.pop_all()
    return trainer


def _warn_of_unknown_ages(config: TrainerConfig) -> None:
    """Say that what is set for old batches does nothing where no version is ever known."""
    loss = config.loss
    set_for_age = [
        name
        for name, is_set in (
            ("loss.max_staleness", loss.max_staleness is not None),
            ("loss.staleness_discount", loss.staleness_discount != 1),
            ("loss.proximal", getattr(loss.bound.options, "proximal", "") == "interpolated"),
        )
        if is_set
    ]
    if set_for_age and config.publish.transport == "none":
        logger.warning(
            "%s: no effect, because with publish.transport none nobody knows which version a batch was "
            "sampled from, so no batch has an age; publish from here, or leave it out",
            " and ".join(set_for_age),
        )


def build_publisher(
    config: TrainerConfig, prepared: PreparedRun, *, stop_requested: Callable[[], bool] = lambda: False
) -> Publisher | None:
    """The configured publisher; None with `publish.transport: none`.

    Args:
        config: The configuration.
        prepared: The model and what belongs to it.
        stop_requested: Whether the run is to end soon.

    Raises:
        ConfigurationError: The transport does not go with the engine or the model.
    """
    settings = config.publish
    if settings.transport == "none":
        return None
    fitting = None  # what the servers' log-probs have to be at temperatures other than 1, for the loss
    if config.loss.needs_inference_logprobs:
        fitting = LogprobKind.SCALED if config.loss.uses_temperature else LogprobKind.RAW
    part = PublishPart(config, prepared)

    def score(probes: Probes) -> ProbeScores:
        with together(prepared.joined, Order.SCORE):
            return part.score(probes)

    return Publisher(
        settings,
        transport=_build_transport(config, prepared, part),
        servers=build_servers(settings),
        probes=part.probes,
        score=score,
        logprobs=LogprobPolicy(required=settings.logprobs, fitting=fitting),
        stop_requested=stop_requested,
    )


def build_servers(settings: PublishSettings) -> list[InferenceServer]:
    """The inference servers, each in the dialect of its engine."""
    if settings.engine == "sglang":
        return [SglangRoutes(url, settings) for url in settings.servers]
    return [VllmRoutes(url, settings) for url in settings.servers]


def _build_transport(config: TrainerConfig, prepared: PreparedRun, part: PublishPart) -> WeightTransport:
    """The configured way of the weights.

    Raises:
        ConfigurationError: It does not go with the model, the engine, or the number of processes.
    """
    settings = config.publish
    stream = part.stream
    directory = publish_directory(config)
    mode = PUBLISHED_MODES[settings.readable_by]

    def write(path: Path) -> None:
        with together(prepared.joined, Order.CAPTURE):
            write_without_copy(path, stream, mode=mode)

    def capture() -> Callable[[Path], None]:
        if not settings.overlap:  # the model stays as it is until the version is proven
            return write
        part.finish_sending()
        # Not flushed to the disk: after a crash the trainer publishes anew.
        with together(prepared.joined, Order.CAPTURE):
            return partial(part.capture(), durable=False, mode=mode)

    def capture_adapter() -> CapturedAdapter:
        with together(prepared.joined, Order.CAPTURE_ADAPTER):
            return part.capture_adapter()

    if settings.transport in ("nccl", "ipc"):
        if settings.transport == "ipc" and prepared.accelerator.num_processes > 1:
            raise ConfigurationError(
                "publish.transport ipc is for a trainer of one process; with several use nccl or disk"
            )
        if not stream.piecewise:
            raise ConfigurationError(
                f"publish.transport {settings.transport}: the checkpoint layout of this model mixes weights "
                "of several layers, so it cannot be sent piece by piece; use publish.transport disk"
            )
        sending = partial(_conducted, prepared.joined, part.requests) if part.requests else nullcontext
        return VllmTransferTransport(settings.transport, stream, settings, sending=sending)
    if settings.transport == "delta":

        def take(version: int) -> Update:
            part.finish_sending()
            with together(prepared.joined, Order.CAPTURE, version):
                return part.take_update(version)

        def write_directory(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
            write_model_directory(path, stream, tensors, durable=False, mode=mode)

        return DeltaTransport(directory, take, write_directory, settings, mode=mode)
    disk = DiskTransport(directory, capture, keep=settings.keep, mode=mode)
    if settings.transport == "disk":
        return disk
    return LoraTransport(
        directory,
        capture_adapter,
        keep=settings.keep,
        merged=disk if settings.lora_fallback == "merged" else None,
        mode=mode,
    )


@contextmanager
def _conducted(joined: JoinedRun, requests: WeightRequests) -> Iterator[None]:
    """Let the others give process 0 their rows of the weights that it reads inside, in whatever thread.

    Raises:
        AnotherProcessFailed: One of them is gone.
    """
    announce(joined, Order.SEND)
    try:
        with translated_peer_failures(), requests.session():
            yield
    finally:
        if requests.failure is not None:
            joined.part()

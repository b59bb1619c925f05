"""Building a trainer with its source and publisher from a configuration."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from atropos_client.journal import Journal
from atropos_client.private_files import PRIVATE_DIRECTORY
from schemas import BatchReply
from trainer.adapter_directory import capture_adapter
from trainer.checkpoint_store import list_checkpoints
from trainer.config import PublishSettings, TrainerConfig
from trainer.errors import CheckpointError, ConfigurationError
from trainer.journaled_source import JournaledSource, open_journal
from trainer.loop import Trainer
from trainer.metrics import Row
from trainer.model_directory import capture_model
from trainer.preparation import PreparedStep
from trainer.publish import (
    DiskTransport,
    InferenceServer,
    LogprobKind,
    LogprobPolicy,
    LoraTransport,
    Publisher,
    SglangGroupTransport,
    SglangRoutes,
    VllmRoutes,
    VllmTransferTransport,
    WeightStream,
    WeightTransport,
    make_probes,
    score_probes,
)
from trainer.setup import Prepared, checkpoint_directory, prepare_run
from trainer.sources import AtroposSource, BatchSource, RecordedSource
from trainer.watch import Progress

PUBLISHED_MODES = {"owner": PRIVATE_DIRECTORY, "group": 0o750, "everyone": 0o755}
"""Permissions of published directories by `publish.readable_by`."""


def build_trainer(
    config: TrainerConfig,
    *,
    source: BatchSource | None = None,
    on_row: Callable[[Row], None] | None = None,
    progress: Progress | None = None,
) -> Trainer:
    """Build a run.

    Args:
        config: The configuration.
        source: Where batches come from. None: the configured Atropos API, through the journal in the output
            directory unless `journal.enabled` is off.
        on_row: Called with every metrics row.
        progress: Where the present phase and how far the run has come are noted.

    Raises:
        ConfigurationError: The model cannot be loaded, or another setting does not fit it.
        CheckpointError: The newest checkpoint cannot be read, or another run wrote one meanwhile.
        JournalError: Another run writes to the journal, or it cannot be read or written.
    """
    prepared = prepare_run(config)
    is_main_process = prepared.accelerator.is_main_process
    trainer: Trainer

    def served_version() -> int:
        """What environments sampled from when a batch arrived, as far as it is known."""
        if publisher is None:
            return -1
        version = publisher.loaded_version
        if version is None:  # a publish is under way: what was proven last is what most of it came from
            version = publisher.served_version
        return -1 if version is None else version

    def step() -> int:
        return trainer.step

    def prepare(reply: BatchReply) -> PreparedStep:
        return trainer.prepare(reply)

    with ExitStack() as closed_on_failure:
        journal = None
        if source is None and not is_main_process:
            source = RecordedSource(())  # process 0 is asked
        elif source is None and config.journal.enabled:
            journal = closed_on_failure.enter_context(_open_journal(config, prepared))
            counted = prepared.checkpoint.state.batches if prepared.checkpoint is not None else 0
            source = JournaledSource(
                config, journal, after=counted, served_version=served_version, step=step, prepare=prepare
            )
        elif source is None:
            source = AtroposSource(config, served_version=served_version, step=step, prepare=prepare)
        publisher = None
        if is_main_process:
            publisher = build_publisher(config, prepared, stop_requested=lambda: trainer.save_if_stopping())
        trainer = Trainer(
            config,
            prepared,
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


def _open_journal(config: TrainerConfig, prepared: Prepared) -> Journal:
    """Open the journal, which takes as long as another process still writes to it."""
    journal = open_journal(config)
    newest = list_checkpoints(checkpoint_directory(config))[-1:]
    ours = [prepared.checkpoint.path] if prepared.checkpoint is not None else []
    if newest != ours:
        journal.close()
        raise CheckpointError(
            f"another run in {config.train.output_dir} changed its checkpoints while this one started; start "
            "again to go on from the newest one"
        )
    return journal


def build_publisher(
    config: TrainerConfig, prepared: Prepared, *, stop_requested: Callable[[], bool] = lambda: False
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
    policy = prepared.policy
    context = min(policy.limits.max_sequence_length, config.atropos.max_token_length)
    return Publisher(
        settings,
        transport=build_transport(config, prepared),
        servers=build_servers(settings),
        probes=make_probes(policy.tokenizer, settings.probes, context=context),
        score=lambda probes: score_probes(policy.model, probes, prepared.accelerator.device),
        logprobs=logprob_policy(config),
        stop_requested=stop_requested,
    )


def logprob_policy(config: TrainerConfig) -> LogprobPolicy:
    """What the servers' log-probs have to be at temperatures other than 1, and what would fit the loss."""
    fitting = None
    if config.loss.needs_inference_logprobs:
        fitting = LogprobKind.SCALED if config.loss.uses_temperature else LogprobKind.RAW
    return LogprobPolicy(required=config.publish.logprobs, fitting=fitting)


def build_servers(settings: PublishSettings) -> list[InferenceServer]:
    """The inference servers, each in the dialect of its engine."""
    if settings.engine == "sglang":
        return [SglangRoutes(url, settings) for url in settings.servers]
    return [VllmRoutes(url, settings) for url in settings.servers]


def build_transport(config: TrainerConfig, prepared: Prepared) -> WeightTransport:
    """The configured way of the weights.

    Raises:
        ConfigurationError: It does not go with the model, the engine, or the number of processes.
    """
    settings = config.publish
    policy = prepared.policy
    dtype = policy.stored_dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    directory = settings.directory or config.train.output_dir / "published"
    mode = PUBLISHED_MODES[settings.readable_by]

    def capture() -> Callable[[Path], None]:
        captured = capture_model(policy.model, tokenizer=policy.tokenizer, dtype=dtype)
        # Not flushed to the disk: after a crash the trainer publishes anew.
        return lambda path: captured.write(path, durable=False, mode=mode)

    if settings.transport in ("nccl", "ipc"):
        if settings.transport == "ipc" and prepared.accelerator.num_processes > 1:
            raise ConfigurationError(
                "publish.transport ipc is for a trainer of one process; with several use nccl or disk"
            )
        try:
            stream = WeightStream(policy.model, dtype=dtype, bucket_bytes=settings.bucket_mebibytes << 20)
        except CheckpointError as error:
            raise ConfigurationError(f"publish.transport {settings.transport}: {error}") from error
        if settings.engine == "sglang":
            return SglangGroupTransport(stream, settings)
        return VllmTransferTransport(settings.transport, stream, settings)
    disk = DiskTransport(directory, capture, keep=settings.keep, mode=mode)
    if settings.transport == "disk":
        return disk
    return LoraTransport(
        directory,
        lambda: capture_adapter(policy.model, dtype=dtype),
        keep=settings.keep,
        merged=disk if settings.lora_fallback == "merged" else None,
        mode=mode,
    )

"""Building a trainer with its source and publisher from a configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from trainer.config import TrainerConfig
from trainer.loop import Trainer
from trainer.metrics import Row
from trainer.model_directory import write_model_directory
from trainer.publish import Publisher, make_probes, score_with_model
from trainer.setup import Prepared, prepare_run
from trainer.sources import AtroposSource, BatchSource


def build_trainer(
    config: TrainerConfig,
    *,
    source: BatchSource | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> Trainer:
    """Build a run.

    Args:
        config: The configuration.
        source: Where batches come from. None: the configured Atropos API.
        on_row: Called with every metrics row.

    Raises:
        ConfigurationError: The model cannot be loaded, or another setting does not fit it.
        CheckpointError: The newest checkpoint cannot be read.
    """
    prepared = prepare_run(config)
    publisher = build_publisher(config, prepared) if prepared.accelerator.is_main_process else None

    def served_version() -> int:
        version = publisher.served_version if publisher is not None else None
        return -1 if version is None else version

    trainer: Trainer

    def step() -> int:
        return trainer.step

    trainer = Trainer(
        config,
        prepared,
        source=source or AtroposSource(config, served_version=served_version, step=step),
        publisher=publisher,
        on_row=on_row,
    )
    return trainer


def build_publisher(config: TrainerConfig, prepared: Prepared) -> Publisher | None:
    """The configured publisher; None with `publish.transport: none`."""
    settings = config.publish
    if settings.transport == "none":
        return None
    policy = prepared.policy
    dtype = policy.stored_dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)

    def write(path: Path) -> None:
        write_model_directory(path, model=policy.model, tokenizer=policy.tokenizer, dtype=dtype)

    return Publisher(
        settings,
        probes=make_probes(policy.tokenizer, settings.probes),
        score=lambda probes: score_with_model(policy.model, probes, prepared.accelerator.device),
        write=write,
        directory=settings.directory or config.train.output_dir / "published",
    )

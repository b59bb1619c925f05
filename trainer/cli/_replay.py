"""`atropos-train replay`: train from recorded batches, with the same loop as `run` and no Atropos API."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.cli._logging import configure_logging
from trainer.cli._settings import add_settings, read_settings

if TYPE_CHECKING:
    from trainer.config import TrainerConfig
    from trainer.loop import RunSummary

logger = logging.getLogger(__name__)


class ReplayCommand:
    """Trains on recordings until they or train.steps end; see `Command`."""

    name = "replay"
    help = "train from a journal or from files that environments wrote, without an Atropos API"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Take all settings, and where the batches come from."""
        add_settings(parser)
        parser.usage = "%(prog)s --replay.from PATH ... [--config FILE] [--section.key VALUE ...]"
        group = parser.add_argument_group("replay")
        group.add_argument(
            "--replay.from",
            dest="replay_from",
            metavar="PATH",
            type=Path,
            nargs="+",
            required=True,
            help="journal directories, output directories that hold one, or JSONL files of groups or texts",
        )
        group.add_argument(
            "--replay.order",
            dest="replay_order",
            choices=["arrival", "ledger"],
            default="arrival",
            help="of a journal: every batch as it came, or those that its run trained on, in order of steps",
        )
        group.add_argument(
            "--replay.partial",
            dest="replay_partial",
            choices=["train", "leave"],
            default="train",
            help="what to do with a last batch of fewer than atropos.batch_size sequences",
        )
        group.add_argument(
            "--replay.publish",
            dest="replay_publish",
            action="store_true",
            help="publish as the configuration says; otherwise nothing is published",
        )

    def run(self, args: argparse.Namespace) -> int:
        """Run, and say how it ended."""
        config = read_settings(args)
        configure_logging(config.logging.level)
        from atropos_client import AtroposClientError
        from trainer.cli._run import report
        from trainer.errors import ConfigurationError, TrainerError

        try:
            summary = replay(
                config,
                args.replay_from,
                order=args.replay_order,
                train_partial=args.replay_partial == "train",
                publish=args.replay_publish,
            )
        except ConfigurationError:
            raise
        except (TrainerError, AtroposClientError) as error:
            logger.error("The replay failed: %s: %s", type(error).__name__, error)  # noqa: TRY400 - expected
            return 1
        return report(summary)


def replay(
    config: TrainerConfig,
    paths: list[Path],
    *,
    order: Any = "arrival",
    train_partial: bool = True,
    publish: bool = False,
) -> RunSummary:
    """Train on recordings.

    Without `train.steps` in the configuration, as many steps as there are batches: one pass over all of them.
    A run that is resumed passes over the batches that its checkpoint counts.

    Args:
        config: The configuration.
        paths: See `trainer.replay`.
        order: Of journals, "arrival" or "ledger".
        train_partial: Whether to train on a last batch that is not full.
        publish: Whether to publish as configured.

    Raises:
        TrainerError: See `trainer.errors`.
        AtroposClientError: A journal cannot be read.
    """
    # torch and transformers take seconds to load.
    from trainer.checkpoint_store import newest_whole_checkpoint
    from trainer.cli._run import train
    from trainer.replay import ReplaySource
    from trainer.setup import checkpoint_directory

    checkpoint = newest_whole_checkpoint(checkpoint_directory(config))
    source = ReplaySource(
        paths,
        batch_size=config.atropos.batch_size,
        encode=_supervised_encoder(config),
        order=order,
        train_partial=train_partial,
        skip=checkpoint.state.batches if checkpoint is not None else 0,
    )
    return train(adapt(config, steps=source.count, publish=publish), source=source)


def adapt(config: TrainerConfig, *, steps: Any, publish: bool) -> TrainerConfig:
    """The configuration of a replay: one pass unless it says how many steps, and perhaps no publishing."""
    changes: dict[str, Any] = {}
    if "steps" not in config.train.model_fields_set:
        count = max(1, steps())
        logger.info("Replaying %d batches, one step each (train.steps is not set).", count)
        changes["train"] = config.train.model_copy(update={"steps": count})
    if not publish:
        changes["publish"] = config.publish.model_copy(update={"transport": "none"})
    return config.model_copy(update=changes)


def _supervised_encoder(config: TrainerConfig) -> Any:
    """Encode texts with the model's tokenizer, which is loaded when the first one comes."""
    from functools import cache

    from transformers import AutoTokenizer

    from trainer.supervised import encode_supervised

    @cache
    def tokenizer() -> Any:
        settings = config.model
        return AutoTokenizer.from_pretrained(
            settings.tokenizer_path or settings.path, trust_remote_code=settings.trust_remote_code
        )

    return lambda line: encode_supervised(line, tokenizer())

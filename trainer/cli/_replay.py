"""`atropos-train replay`: train from recorded batches, with the same loop as `run` and no Atropos API."""

from __future__ import annotations

import argparse
import logging
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atropos_client.journal import JOURNAL_FILE
from schemas import count_of
from trainer.cli._logging import configure_logging
from trainer.cli._settings import add_settings, path_argument, read_settings
from trainer.errors import ConfigurationError

if TYPE_CHECKING:
    from trainer.checkpoints.format import Checkpoint
    from trainer.config import TrainerConfig
    from trainer.run.loop import RunSummary
    from trainer.sources.replay import ReplaySource

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
            type=path_argument,
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
        for word in args.settings:
            if word.startswith("--replay."):
                raise ConfigurationError(
                    f"there is no argument {word}; those of a replay are --replay.from, --replay.order, "
                    "--replay.partial and --replay.publish"
                )
        config = read_settings(args)
        configure_logging(config.logging.level)
        summary = replay(
            config,
            args.replay_from,
            order=args.replay_order,
            train_partial=args.replay_partial == "train",
            publish=args.replay_publish,
        )
        from trainer.cli._run import report

        return report(summary, config)


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
    A replay that is resumed passes over the batches that its checkpoint counts.

    Args:
        config: The configuration.
        paths: See `trainer.sources.replay`.
        order: Of journals, "arrival" or "ledger".
        train_partial: Whether to train on a last batch that is not full.
        publish: Whether to publish as configured.

    Raises:
        TrainerError: See `trainer.errors`.
        AtroposClientError: A journal cannot be read any further.
    """
    # torch and transformers take seconds to load.
    from trainer.cli._run import train
    from trainer.sources.replay import ReplaySource

    source = ReplaySource(
        paths,
        batch_size=config.atropos.batch_size,
        encode=_supervised_encoder(config),
        order=order,
        train_partial=train_partial,
    )
    source.require_batches()  # before anything is written
    return train(
        adapt(config, steps=source.count, publish=publish), source=source, accept=partial(_go_on, source)
    )


def _go_on(source: ReplaySource, config: TrainerConfig, checkpoint: Checkpoint | None) -> None:
    """Let the recordings go on from a checkpoint.

    Raises:
        ConfigurationError: The directory is that of a run on other batches.
    """
    from trainer.run.places import journal_directory

    state = checkpoint.state if checkpoint is not None else None
    recorded = (journal_directory(config) / JOURNAL_FILE).exists()
    if recorded or (state is not None and state.batches and not state.position):
        raise ConfigurationError(
            f"train.output_dir {config.train.output_dir} is that of a run on an Atropos API; choose another: "
            "a replay needs one of its own"
        )
    if state is not None:
        source.pass_over(state.batches, position=state.position)


def adapt(config: TrainerConfig, *, steps: Any, publish: bool) -> TrainerConfig:
    """The configuration of a replay: one pass unless it says how many steps, and perhaps no publishing."""
    # Whether a replay goes on with another batch size is for its recordings to say, which know.
    train: dict[str, Any] = {"resume_changes": [*config.train.resume_changes, "atropos.batch_size"]}
    if "steps" not in config.train.model_fields_set:
        count = max(1, steps())
        logger.info("Replaying %s, one step each (train.steps is not set).", count_of(count, "batch"))
        train["steps"] = count
    changes: dict[str, Any] = {"train": config.train.model_copy(update=train)}
    if not publish:
        changes["publish"] = config.publish.model_copy(update={"transport": "none"})
    return config.model_copy(update=changes)


def _supervised_encoder(config: TrainerConfig) -> Any:
    """Encode texts with the model's tokenizer, which is loaded when the first one comes."""
    from trainer.model.load import load_policy_tokenizer
    from trainer.sources.sft_files import encode_supervised

    tokenizer = cache(lambda: load_policy_tokenizer(config.model))
    return lambda line: encode_supervised(line, tokenizer())

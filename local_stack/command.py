"""`atropos-train local`: the command-line side of the launcher.

`trainer.cli` finds `LOCAL_COMMAND` through the entry point group `atropos_trainer.commands`, so that the
trainer itself imports nothing from here. The heavy imports wait until the command runs.
"""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path
from typing import Protocol

DEFAULT_STEPS = 30
_DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"


class Command(Protocol):
    """One sub-command of `atropos-train`."""

    name: str
    help: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's own arguments."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Run the command and return its exit status."""


class LocalCommand:
    """The whole stack on this machine: API, inference server, environment, trainer, report."""

    name = "local"
    help = "run the whole loop on this machine: API, inference server, environment and trainer"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments of `atropos-train local`."""
        parser.add_argument(
            "--model",
            default="demo",
            metavar="MODEL",
            help="demo (SmolLM2-135M-Instruct from a package, no download from a model hub), tiny (random, "
            "for a quick look), a checkpoint directory, or a hub id; default: demo",
        )
        parser.add_argument(
            "--steps",
            type=_positive,
            default=DEFAULT_STEPS,
            help=f"optimizer steps; default: {DEFAULT_STEPS}",
        )
        parser.add_argument("--seed", type=int, default=0, help="seed of problems, sampling and training")
        parser.add_argument(
            "--run-dir",
            type=Path,
            default=None,
            help="where everything is written; an unfinished run goes on from its newest checkpoint; "
            "default: a new directory below runs/",
        )
        parser.add_argument(
            "--config", type=Path, default=_DEFAULT_CONFIG, help="the trainer's settings; default: the demo's"
        )
        parser.add_argument(
            "--set",
            dest="settings",
            action="append",
            default=[],
            metavar="SECTION.KEY=VALUE",
            type=_setting,
            help="a further setting for the trainer, e.g. optimizer.learning_rate=1e-5; may be repeated",
        )

    def run(self, arguments: argparse.Namespace) -> int:
        """Run the stack; 0 done, 1 failed, 130 stopped by the user."""
        from rich.console import Console

        from local_stack.launcher import LocalOptions, run_local

        options = LocalOptions(
            model=arguments.model,
            steps=arguments.steps,
            seed=arguments.seed,
            run_dir=arguments.run_dir or new_run_directory(),
            config=arguments.config,
            trainer_arguments=tuple(word for setting in arguments.settings for word in setting),
        )
        return run_local(options, Console())


def new_run_directory(now: datetime | None = None) -> Path:
    """Return a name below runs/ that says when the run began."""
    moment = now or datetime.now().astimezone()
    return Path("runs") / f"local-{moment:%Y%m%d-%H%M%S}"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or "." not in name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form SECTION.KEY=VALUE")
    return f"--{name}", value


LOCAL_COMMAND: Command = LocalCommand()

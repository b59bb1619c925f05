"""`atropos-train local`: the command-line side of the launcher.

`trainer.cli` finds `LOCAL_COMMAND` through the entry point group `atropos_trainer.commands`, so that the
trainer itself imports nothing from here. The heavy imports wait until the command runs.
"""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.cli import Command

_DEFAULT_CONFIG = Path(__file__).resolve().parent / "demo.yaml"


class LocalCommand:
    """The whole stack on this machine: API, inference server, environment, trainer, report."""

    name = "local"
    help = "run the whole loop on this machine: API, inference server, environment and trainer"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments of `atropos-train local`."""
        add = parser.add_argument
        add(
            "--model",
            default="demo",
            metavar="MODEL",
            help="demo (SmolLM2-135M-Instruct from a package, no download from a model hub), tiny (random, "
            "for a quick look), a checkpoint directory, or a hub id; default: demo",
        )
        add("--steps", type=positive, default=25, help="optimizer steps; default: 25")
        add(
            "--engine",
            choices=("embedded", "vllm"),
            default="embedded",
            help="inference server: embedded (small, starts in seconds) or vllm (stock vLLM with our "
            "middleware, from an environment of its own: make vllm); default: embedded",
        )
        add(
            "--vllm-python",
            type=_path,
            metavar="PATH",
            help="interpreter of the environment with vLLM; default: .venv-vllm/bin/python",
        )
        add("--seed", type=int, default=0, help="seed of problems, sampling and training")
        add(
            "--run-dir",
            type=_path,
            help="where everything is written; an unfinished run goes on from its newest checkpoint; "
            "default: a new directory below runs/",
        )
        add(
            "--config",
            type=_path,
            default=_DEFAULT_CONFIG,
            help="the trainer's settings; default: the demo's",
        )
        parser.epilog = (
            "Every setting of `atropos-train run` can be given too, e.g. --optimizer.learning_rate 1e-5"
        )
        parser.set_defaults(settings=[])  # `trainer.cli` puts the arguments that are none of these here

    def run(self, args: argparse.Namespace) -> int:
        """Run the stack; 0 done, 1 failed, 130 stopped by the user."""
        # Every `atropos-train` command loads this module; only this one needs these.
        from rich.console import Console

        from local_stack.launcher import LocalOptions, check_settings, run_local
        from local_stack.vllm import DEFAULT_PYTHON

        options = LocalOptions(
            model=args.model,
            steps=args.steps,
            seed=args.seed,
            run_dir=args.run_dir or new_run_directory(),
            config=args.config,
            settings=tuple(args.settings),
            engine=args.engine,
            vllm_python=args.vllm_python or DEFAULT_PYTHON,
        )
        check_settings(options)
        return run_local(options, Console())


def new_run_directory(now: datetime | None = None) -> Path:
    """Return a name below runs/ that says when the run began."""
    moment = now or datetime.now().astimezone()
    return Path("runs") / f"local-{moment:%Y%m%d-%H%M%S}"


def _path(text: str) -> Path:
    from trainer.config import expand_home

    return Path(expand_home(text))


def positive(text: str) -> int:
    """Read a count from the command line.

    Raises:
        ArgumentTypeError: It is below 1.
    """
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


LOCAL_COMMAND: Command = LocalCommand()

"""Choosing and running a command; every expected failure becomes a message and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 75 stuck and
ended by the watchdog (start again), 130 ended by SIGINT (Ctrl-C), 143 by SIGTERM.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Protocol

from atropos_client.private_files import private_umask
from schemas import printable
from trainer.cli._check import CheckCommand
from trainer.cli._checkpoint import CheckpointCommand
from trainer.cli._journal import JournalCommand
from trainer.cli._replay import ReplayCommand
from trainer.cli._run import RunCommand
from trainer.errors import ConfigurationError

logger = logging.getLogger(__name__)

COMMAND_GROUP = "atropos_trainer.commands"
"""Entry points of this group are further commands."""


class Command(Protocol):
    """One command of `atropos-train`."""

    name: str
    """The word on the command line."""
    help: str
    """One line for the list of commands."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare arguments on the command's own parser."""

    def run(self, args: argparse.Namespace) -> int:
        """Run it; returns the exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `atropos-train` with the given words, or with those of the process."""
    commands = _commands()
    parser = argparse.ArgumentParser(
        prog="atropos-train",
        description="Train a language model on rollouts from the Atropos API and publish it to the inference "
        "servers that the environments sample from.",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in commands.values():
        subparser = subparsers.add_parser(
            command.name,
            help=command.help,
            description=command.help,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
    args, settings = parser.parse_known_args(argv)
    if hasattr(args, "settings"):
        args.settings = settings
    elif settings:
        parser.error(f"{args.command}: unknown arguments: {' '.join(settings)}")
    try:
        with private_umask():
            return commands[args.command].run(args)
    except ConfigurationError as error:
        sys.stderr.write(f"atropos-train: {printable(str(error), lines=True)}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("atropos-train: interrupted\n")
        return 130


def _commands() -> dict[str, Command]:
    """Our own commands and those that installed packages add."""
    commands: list[Command] = [
        RunCommand(),
        CheckCommand(),
        CheckpointCommand(),
        JournalCommand(),
        ReplayCommand(),
    ]
    commands += [entry_point.load() for entry_point in sorted(entry_points(group=COMMAND_GROUP))]
    return {command.name: command for command in commands}

"""Chooses and runs a command.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 75 stuck and ended by the watchdog (start
again), 128 + n ended by signal n (130 SIGINT, 143 SIGTERM), 141 nobody reads the output any more.
What is said then: `trainer.cli._failures`.
"""

from __future__ import annotations

import argparse
import io
import signal
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import entry_points

from atropos_client.private_files import private_umask
from trainer.cli._check import CheckCommand
from trainer.cli._checkpoint import CheckpointCommand
from trainer.cli._command import Command
from trainer.cli._failures import NOBODY_READS, discard_output, explain, nobody_reads, open_missing_streams
from trainer.cli._journal import JournalCommand
from trainer.cli._replay import ReplayCommand
from trainer.cli._report import ReportCommand
from trainer.cli._run import RunCommand
from trainer.cli._view import ViewCommand

COMMAND_GROUP = "atropos_trainer.commands"
"""Entry points of this group are further commands."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `atropos-train` with the given words, or with those of the process."""
    open_missing_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):  # LANG=C, say; standard error is like this already
        sys.stdout.reconfigure(errors="backslashreplace")
    args = argparse.Namespace(command="")
    try:
        try:
            _parse(argv, args)
            with private_umask():
                return _commands()[args.command].run(args)
        finally:
            sys.stdout.flush()
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        if nobody_reads(error):
            discard_output()
            return NOBODY_READS
        if isinstance(error, SystemExit):  # argparse's
            raise
        code = explain(error, args)
        try:
            sys.stdout.flush()
        except OSError:
            discard_output()
        return code
    finally:
        if argv is None:  # the process ends: from here on a Ctrl-C has nothing to interrupt
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _parse(argv: Sequence[str] | None, args: argparse.Namespace) -> None:
    parser = argparse.ArgumentParser(
        prog="atropos-train",
        description="Train a language model on rollouts from the Atropos API and publish it to the inference "
        "servers that the environments sample from.",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in _commands().values():
        subparser = subparsers.add_parser(
            command.name,
            help=command.help,
            description=command.help,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            conflict_handler="resolve",  # commands may have a --help of their own
        )
        subparser.set_defaults(words=sys.argv[1:] if argv is None else argv)
        command.add_arguments(subparser)
    _, settings = parser.parse_known_args(argv, args)
    if hasattr(args, "settings"):
        args.settings = settings
    elif settings:
        parser.error(f"{args.command}: unknown arguments: {' '.join(settings)}")


class _BrokenCommand:
    """A command of an installed package that cannot be loaded: the others work all the same."""

    help = "cannot be loaded"

    def __init__(self, name: str, error: Exception) -> None:
        self.name = name
        self._error = error

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.set_defaults(settings=[])

    def run(self, args: argparse.Namespace) -> int:
        del args
        raise self._error


@cache
def _commands() -> dict[str, Command]:
    """Our own commands and those that installed packages add."""
    commands: list[Command] = [
        RunCommand(),
        CheckCommand(),
        CheckpointCommand(),
        JournalCommand(),
        ReplayCommand(),
        ViewCommand(),
        ReportCommand(),
    ]
    for entry_point in sorted(entry_points(group=COMMAND_GROUP)):
        try:
            commands.append(entry_point.load())
        except Exception as error:  # noqa: BLE001 - whatever another package does when it is loaded
            commands.append(_BrokenCommand(entry_point.name, error))
    return {command.name: command for command in commands}

"""`atropos-train journal`: look into the journal of a run, also while the run goes on."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from atropos_client import JournalDamaged
from atropos_client.journal import Journal, LedgerEntry, export_batches
from schemas import count_of
from trainer.cli._journal_show import OUTCOME_COLORS, format_time, show_batches
from trainer.cli._logging import configure_logging, escape
from trainer.cli._settings import path_argument

_PIPE_WIDTH = 250


class JournalCommand:
    """Lists, shows, exports and verifies a journal, or skips batches of it; see `Command`."""

    name = "journal"
    help = "list, show, export or verify the journal of a run, or have batches of it skipped"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Take an action, a directory, and batch numbers."""
        parser.add_argument("action", choices=list(_ACTIONS))
        parser.add_argument(
            "directory",
            type=path_argument,
            metavar="DIR",
            help="a run's output directory, or the journal in it",
        )
        parser.add_argument(
            "numbers",
            type=int,
            nargs="*",
            metavar="NUMBER",
            help="batches to list, show or export, default all; or to skip: they are set aside unread when "
            "the run comes to them",
        )
        parser.add_argument(
            "--text",
            metavar="TOKENIZER",
            help="show: print the texts, decoded with the tokenizer of this directory, or the run's own of "
            "the hub; what is trained stands in ⟦ ⟧",
        )
        parser.add_argument(
            "--groups", action="store_true", help="export: one line a group, as environments write them"
        )

    def run(self, args: argparse.Namespace) -> int:
        """Do it; returns 1 if the journal is damaged."""
        configure_logging("ERROR")
        directory = args.directory
        if not (directory / "journal.sqlite3").is_file() and (directory / "journal").is_dir():
            directory /= "journal"
        with _opened(directory) as journal:
            if args.action != "skip":
                return _ACTIONS[args.action](journal, args)
        with Journal.open(directory) as journal:  # never one that is not there: it would make it
            return skip_batches(journal, args)


def _opened(directory: Path) -> Journal:
    """Open a journal to look at it; where that fails, none of the actions that a message names would help."""
    try:
        return Journal.read_only(directory)
    except JournalDamaged as error:
        raise JournalDamaged(
            f"{error.found}, so that it cannot be opened at all. Put a whole copy of it back; or move the "
            "directory away and start once with --journal.accept_loss true"
        ) from error


def list_batches(journal: Journal, args: argparse.Namespace) -> int:
    """Print the ledger as a table, and totals."""
    # Through a pipe there is no width to fit into.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("batch", "received", "version", "bytes", "kept", "outcome", "step"):
        left = heading in ("received", "outcome")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    table.add_column("reason", overflow="fold")
    counts: Counter[str] = Counter()
    for entry in journal.ledger():
        if args.numbers and entry.number not in args.numbers:
            continue
        counts[entry.outcome] += 1
        table.add_row(*_cells(entry))
    console.print(table)
    usage = journal.usage()
    totals = ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "no batches"
    console.print(
        f"{totals}; {usage.used / 1e6:.1f} MB used, and {usage.reusable / 1e6:.1f} MB of the file empty, "
        "to be used next"
    )
    return 0


def _cells(entry: LedgerEntry) -> list[str]:
    color = OUTCOME_COLORS[entry.outcome]
    return [
        str(entry.number),
        format_time(entry.received_at),
        "?" if entry.served_version < 0 else str(entry.served_version),
        f"{entry.size:,}",
        "pruned" if entry.stored_size is None else f"{entry.stored_size:,}",
        f"[{color}]{entry.outcome}[/]",
        "" if entry.step is None else str(entry.step),
        escape(entry.reason or ""),
    ]


def export(journal: Journal, args: argparse.Namespace) -> int:
    """Write JSON lines to standard output."""
    numbers = args.numbers or journal.numbers_after(0)
    for line in export_batches(journal, numbers, form="groups" if args.groups else "batches"):
        sys.stdout.write(line + "\n")
    return 0


def verify(journal: Journal, args: argparse.Namespace) -> int:
    """Read everything and compare it with its checksums; returns 1 if anything is wrong."""
    del args
    report = journal.verify()
    console = Console(highlight=False, soft_wrap=True)
    for problem in report.problems:
        console.print(f"[red]failed [/]  {escape(problem)}")
    good = not report.problems
    console.print(
        f"{'[green]ok     [/]' if good else '[red]failed [/]'}  {count_of(report.batches, 'batch')} in the "
        f"ledger, {count_of(report.bodies, 'body')} read, {count_of(len(report.problems), 'problem')}"
    )
    return 0 if good else 1


def skip_batches(journal: Journal, args: argparse.Namespace) -> int:
    """Have batches set aside unread; no run may be going on."""
    if not args.numbers:
        sys.stderr.write("atropos-train journal: say which batches to skip\n")
        return 2
    for number in args.numbers:
        journal.skip(number, "skipped by `atropos-train journal skip`")
        sys.stdout.write(f"batch {number} will be set aside unread when the run comes to it\n")
    return 0


_ACTIONS: dict[str, Callable[[Journal, argparse.Namespace], int]] = {
    "list": list_batches,
    "show": show_batches,
    "export": export,
    "verify": verify,
    "skip": skip_batches,
}

"""`atropos-train journal`: look into the journal of a run, also while the run goes on."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from atropos_client import JournalError, parse_batch
from atropos_client.errors import InvalidReply
from atropos_client.journal import Journal, LedgerEntry, export_batches
from trainer.cli._logging import configure_logging
from trainer.cli._text import escape

_PIPE_WIDTH = 250
_COLORS = {"received": "yellow", "trained": "green", "set_aside": "red", "skipped": "magenta"}


class JournalCommand:
    """Lists, shows, exports and verifies a journal; see `Command`."""

    name = "journal"
    help = "list, show, export or verify the journal of a run"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Take an action, a directory, and batch numbers."""
        parser.add_argument("action", choices=list(_ACTIONS))
        parser.add_argument(
            "directory", type=Path, metavar="DIR", help="a run's output directory, or the journal in it"
        )
        parser.add_argument(
            "numbers",
            type=int,
            nargs="*",
            metavar="NUMBER",
            help="batches to list, show or export; default all",
        )
        parser.add_argument(
            "--groups", action="store_true", help="export: one line a group, as environments write them"
        )

    def run(self, args: argparse.Namespace) -> int:
        """Do it; returns 1 if the journal cannot be read or is damaged."""
        configure_logging("ERROR")
        directory = args.directory
        if not (directory / "journal.sqlite3").is_file() and (directory / "journal").is_dir():
            directory /= "journal"
        try:
            with Journal.read_only(directory) as journal:
                return _ACTIONS[args.action](journal, args)
        except JournalError as error:
            sys.stderr.write(f"atropos-train journal: {error}\n")
            return 1


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
    color = _COLORS[entry.outcome]
    return [
        str(entry.number),
        _time(entry.received_at),
        "?" if entry.served_version < 0 else str(entry.served_version),
        f"{entry.size:,}",
        "pruned" if entry.stored_size is None else f"{entry.stored_size:,}",
        f"[{color}]{entry.outcome}[/]",
        "" if entry.step is None else str(entry.step),
        escape(entry.reason or ""),
    ]


def show_batches(journal: Journal, args: argparse.Namespace) -> int:
    """Print what is in each batch, group by group."""
    console = Console(highlight=False)
    for number in args.numbers or journal.numbers_after(0):
        entry = journal.entry(number)
        version = "unknown" if entry.served_version < 0 else str(entry.served_version)
        step = "" if entry.step is None else f" at step {entry.step}"
        reason = f": {escape(entry.reason)}" if entry.reason else ""
        console.print(
            f"[bold]batch {number}[/]  {_time(entry.received_at)}  served version {version}  "
            f"{entry.size:,} bytes  sha256 {entry.sha256}\n"
            f"  [{_COLORS[entry.outcome]}]{entry.outcome}[/]{step}{reason}",
            soft_wrap=True,
        )
        if entry.stored_size is None:
            console.print("  the body was pruned: it lies behind the oldest checkpoint that is kept")
        else:
            _show_groups(console, journal.read(number).body)
    return 0


def _show_groups(console: Console, body: bytes) -> None:
    try:
        reply = parse_batch(body)
    except InvalidReply as error:
        console.print(f"  unreadable: {escape(str(error))}", soft_wrap=True)
        return
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 2))
    for heading in ("environment", "sequences", "tokens", "trained", "scores"):
        table.add_column(heading, justify="left" if heading == "scores" else "right")
    for group in reply.groups:
        scores = ", ".join(f"{score:g}" for score in group.scores[:8])
        table.add_row(
            str(group.env_id),
            str(group.sequence_count),
            f"{group.token_count:,}",
            f"{group.trained_token_count:,}",
            scores + (", ..." if len(group.scores) > 8 else ""),
        )
    console.print(table)
    for rejected in reply.rejected:
        console.print(f"  [red]group {rejected.index} cannot be trained on[/]: {escape(rejected.reason)}")


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
        f"{'[green]ok     [/]' if good else '[red]failed [/]'}  {report.batches} batches in the ledger, "
        f"{report.bodies} bodies read, {len(report.problems)} problems"
    )
    return 0 if good else 1


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=UTC).strftime("%Y-%m-%d %H:%M:%SZ")


_ACTIONS: dict[str, Callable[[Journal, argparse.Namespace], int]] = {
    "list": list_batches,
    "show": show_batches,
    "export": export,
    "verify": verify,
}

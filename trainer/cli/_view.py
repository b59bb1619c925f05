"""`atropos-train view`: the page of a run that goes on or has ended."""

from __future__ import annotations

import argparse
import sys
import threading
from pathlib import Path
from typing import Final

from trainer.cli._logging import configure_logging
from trainer.cli._settings import path_argument
from trainer.errors import ConfigurationError

_PORT: Final = 9191
_TERMINAL_SECONDS: Final = 2.0
_OF_A_RUN: Final = ("metrics.jsonl", "journal", "checkpoints", "health.json", "journal.sqlite3")


class ViewCommand:
    """Serves the page of a run, of two over one another, or shows it in the terminal; see `Command`."""

    name = "view"
    help = "look at a run: its curves and its rollouts, as a page on this machine"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Take the directories of runs, and where to listen."""
        add_runs(parser)
        parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1")
        parser.add_argument(
            "--port",
            type=int,
            default=None,
            help=f"port to listen on, 0 for any free one; default: {_PORT}, or a free one if that is taken",
        )
        parser.add_argument(
            "--terminal", action="store_true", help="show the overview here instead, until Ctrl-C"
        )
        parser.epilog = (
            "On an address beyond loopback the page asks for the token in the environment variable "
            "ATROPOS_VIEW_TOKEN."
        )

    def run(self, args: argparse.Namespace) -> int:
        """Serve until Ctrl-C."""
        from trainer.monitoring.server import HealthServer
        from trainer.view.access import TOKEN_VARIABLE, Access
        from trainer.view.run_reader import RunReader
        from trainer.view.site import RunSite
        from trainer.view.worker import GuardedSite

        configure_logging("WARNING")
        for run in args.runs:
            require_run(run)
        if args.terminal:
            return show_in_terminal(args.runs[0])
        access = Access.of_environment(args.host)
        if not access.is_open:
            raise ConfigurationError(
                f"--host {args.host} is not loopback: set the environment variable {TOKEN_VARIABLE} to a "
                "secret of 16 characters or more, which the page then asks for"
            )
        readers = [RunReader(run, tokenizer=args.tokenizer) for run in args.runs]
        site = GuardedSite(access, RunSite(readers).answer)

        def listen(port: int) -> HealthServer:
            return HealthServer(args.host, port, {}, site=site, setting="--port")

        try:
            server = listen(_PORT if args.port is None else args.port)
        except ConfigurationError:
            if args.port is not None:
                raise
            server = listen(0)
        with server:
            sys.stdout.write(f"{', '.join(map(str, args.runs))}: {server.url}/  (Ctrl-C ends it)\n")
            sys.stdout.flush()
            threading.Event().wait()
        return 0


def show_in_terminal(run: Path) -> int:
    """Show the overview until Ctrl-C or the end of the run; once where nobody sits at a terminal."""
    import time

    from rich.console import Console
    from rich.live import Live

    from trainer.view.run_reader import RunReader
    from trainer.view.terminal import draw_overview

    reader, console = RunReader(run), Console()
    if not console.is_terminal:
        console.print(draw_overview(reader))
        return 0
    with Live(draw_overview(reader), console=console, auto_refresh=False) as live:
        while (reader.state()["health"] or {}).get("status") != "ended":
            time.sleep(_TERMINAL_SECONDS)
            live.update(draw_overview(reader), refresh=True)
    return 0


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Let a command take the directories of runs, and the tokenizer of their model."""
    parser.add_argument(
        "runs",
        type=path_argument,
        nargs="+",
        metavar="RUN",
        help="a run's output directory; the curves of further ones are drawn over its own",
    )
    parser.add_argument(
        "--tokenizer",
        type=path_argument,
        metavar="DIR",
        help="directory with the model's tokenizer.json; default: where the run says its model is",
    )


def require_run(directory: Path) -> None:
    """Refuse what is no run's directory.

    Raises:
        ConfigurationError: It is none.
    """
    if not any((directory / name).exists() for name in _OF_A_RUN):
        found = "holds no run" if directory.is_dir() else "is no directory"
        raise ConfigurationError(f"{directory} {found}: give a run's output directory (train.output_dir)")

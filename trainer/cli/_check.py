"""`atropos-train check`: probe every party of a run and say what is wrong."""

from __future__ import annotations

import argparse

from rich.console import Console

from trainer.cli._logging import configure_logging, escape
from trainer.cli._settings import add_settings, read_settings
from trainer.launch import launched_rank

MARKS = {"ok": "[green]ok     [/]", "warning": "[yellow]warning[/]", "failed": "[red]failed [/]"}


class CheckCommand:
    """Probes API, environments, inference servers, model and directories; see `Command`."""

    name = "check"
    help = "probe every party of a run and say what is wrong"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Take all settings, and `--publish`."""
        add_settings(parser)
        parser.usage = "%(prog)s [--publish] [--config FILE] [--section.key VALUE ...]"
        parser.add_argument(
            "--publish",
            action="store_true",
            help="also load the model, publish it twice unchanged, and see that nothing changes",
        )

    def run(self, args: argparse.Namespace) -> int:
        """Print one line a probe; returns 1 if any failed."""
        config = read_settings(args)
        configure_logging("ERROR")
        # torch and transformers take seconds to load.
        from trainer.check import run_checks

        console = Console(soft_wrap=True, highlight=False)
        console.quiet = launched_rank() != 0  # it is counted; process 0 looks at everything else
        any_failed = False
        for result in run_checks(config, publish=args.publish):
            found = escape(result.found, lines=True)
            console.print(f"{MARKS[result.status]}  {escape(result.name)}: {found}")
            if result.remedy:
                console.print(f"         -> {escape(result.remedy)}")
            any_failed |= result.status == "failed"
        console.print("Something failed." if any_failed else "A run can start.")
        return 1 if any_failed else 0

"""`atropos-train report`: the page of a run as one file, to send or to keep."""

from __future__ import annotations

import argparse
import sys

from atropos_client.private_files import write_private
from trainer.cli._logging import configure_logging
from trainer.cli._settings import path_argument
from trainer.cli._view import add_runs, require_run
from trainer.errors import ConfigurationError


class ReportCommand:
    """Writes a self-contained HTML file; see `Command`."""

    name = "report"
    help = "write the page of a run as one HTML file that needs no server"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Take the directories of runs, and the file to write."""
        add_runs(parser)
        parser.add_argument(
            "--output", type=path_argument, metavar="FILE", help="default: report.html in the first run"
        )
        parser.add_argument(
            "--groups", type=int, default=60, help="groups of rollouts to take along; default: 60"
        )

    def run(self, args: argparse.Namespace) -> int:
        """Write it."""
        from trainer.view.report import write_report
        from trainer.view.run_reader import RunReader

        configure_logging("WARNING")
        for run in args.runs:
            require_run(run)
        html = write_report(
            [RunReader(run, tokenizer=args.tokenizer) for run in args.runs], groups=max(0, args.groups)
        )
        output = args.output or args.runs[0] / "report.html"
        try:
            write_private(output, html.encode())
        except OSError as error:
            raise ConfigurationError(
                f"--output: {output} cannot be written: {error.strerror or error}"
            ) from error
        sys.stdout.write(f"{output} ({len(html) / 1e6:.1f} MB): open it in a browser\n")
        return 0

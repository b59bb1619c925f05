"""The command `atropos-train`."""

import sys
from collections.abc import Sequence

from trainer.cli._command import Command

__all__ = ["Command", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `atropos-train` with the given words, or with those of the process; returns the exit code."""
    try:
        # Here, so that Ctrl-C during the imports ends as at any other moment.
        from trainer.cli._main import main as run_command
    except KeyboardInterrupt:
        sys.stderr.write("atropos-train: interrupted\n")
        return 130
    return run_command(argv)

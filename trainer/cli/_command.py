"""The interface of a command of `atropos-train`."""

from __future__ import annotations

import argparse
from typing import Protocol


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

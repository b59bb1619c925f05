"""Formats log lines: the same in the trainer and in the process that fetches for it."""

from __future__ import annotations

import logging

from schemas import printable


class PrintableFormatter(logging.Formatter):
    """Formats a record, its traceback included, so that nothing in it acts on a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record; what others say in it has no control characters any more."""
        return printable(super().format(record), lines=True)


def line_formatter(text: str = "%(message)s") -> PrintableFormatter:
    """Make the formatter of a file, or of a container's log: a line a record, with its day."""
    return PrintableFormatter(f"%(asctime)s %(levelname)s {text}", datefmt="%F %T")

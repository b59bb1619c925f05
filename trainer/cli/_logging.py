"""Log lines on the terminal, and how libraries that talk too much are kept short."""

from __future__ import annotations

import logging

from rich.console import Console
from rich.logging import RichHandler

from schemas import printable

# One line a request, and tokens in URLs, are nothing for a run of days.
_QUIET = ("httpx", "httpcore", "urllib3", "filelock", "accelerate", "transformers", "matplotlib")


class PrintableFormatter(logging.Formatter):
    """Formats a record, its traceback included, so that nothing in it acts on a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record; what others say in it has no control characters any more."""
        return printable(super().format(record), lines=True)


def configure_logging(level: str) -> None:
    """Send log lines of `level` and above to standard error."""
    console = Console(stderr=True, soft_wrap=True)
    # Plain tracebacks: rich's own go past the formatter.
    handler = RichHandler(console=console, show_path=False, rich_tracebacks=False, markup=False)
    handler.setFormatter(PrintableFormatter("%(message)s", datefmt="[%X]"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)

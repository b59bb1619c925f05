"""Log lines on the terminal, and how libraries that talk too much are kept short."""

from __future__ import annotations

import logging

from rich.console import Console
from rich.logging import RichHandler

# One line a request, and tokens in URLs, are nothing for a run of days.
_QUIET = ("httpx", "httpcore", "urllib3", "filelock", "accelerate", "transformers", "matplotlib")


def configure_logging(level: str) -> None:
    """Send log lines of `level` and above to standard error."""
    console = Console(stderr=True, soft_wrap=True)
    handler = RichHandler(console=console, show_path=False, rich_tracebacks=True, markup=False)
    logging.basicConfig(level=level, format="%(message)s", datefmt="[%X]", handlers=[handler], force=True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)

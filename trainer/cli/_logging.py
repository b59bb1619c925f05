"""Log lines on the terminal, and how libraries that talk too much are kept short."""

from __future__ import annotations

import logging
import warnings

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape as escape_markup

from atropos_client.log_lines import PrintableFormatter, line_formatter
from schemas import printable
from trainer.launch import launched_rank

# One line a request, and tokens in URLs, are nothing for a run of days.
_QUIET = ("httpx", "httpcore", "urllib3", "filelock", "accelerate", "transformers", "matplotlib", "torch")


class LogConsole(Console):
    """Standard error for log lines and progress: a run goes on where nobody reads them any more."""

    def __init__(self) -> None:
        super().__init__(stderr=True, soft_wrap=True, highlight=False)

    def on_broken_pipe(self) -> None:
        """Be quiet from here on; rich would end the thread that has something to say."""
        self.quiet = True


def configure_logging(level: str) -> None:
    """Send log lines of `level` and above to standard error; of processes other than 0 only warnings.

    These name their rank: most lines would come once from every process.
    """
    rank = launched_rank()
    text = f"[rank {rank}] %(message)s" if rank else "%(message)s"
    console = LogConsole()
    handler: logging.Handler
    if console.is_terminal:
        # Plain tracebacks: rich's own go past the formatter.
        handler = RichHandler(console=console, show_path=False, rich_tracebacks=False, markup=False)
        handler.setFormatter(PrintableFormatter(text, datefmt="[%X]"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(line_formatter(text))
    if rank:
        handler.setLevel(logging.WARNING)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    # torchao, where it is installed, tells everybody which kernels it has for other machines.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # PEFT asks transformers by an old name: nothing that a user could mend.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def escape(text: str, *, lines: bool = False) -> str:
    """Text as it stands, for a console that reads markup: nothing in it acts; for `lines` see `printable`."""
    return escape_markup(printable(text, lines=lines))

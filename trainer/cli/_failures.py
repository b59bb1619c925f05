"""Turns whatever ends a command into one line on standard error and an exit code; nothing else does.

A user's mistake has a message that says what to do. What nobody expected is a bug: its traceback goes to a
file that the line names, and to the terminal with `--logging.level DEBUG`.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.util
import os
import select
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from atropos_client.errors import AtroposClientError
from atropos_client.private_files import open_private
from schemas import printable
from trainer.errors import AnotherProcessFailed, ConfigurationError, TrainerError
from trainer.launch import launched_processes, launched_rank

if TYPE_CHECKING:
    from trainer.config import TrainerConfig

FAILED: Final = 1
WRONG_USAGE: Final = 2
INTERRUPTED: Final = 130
NOBODY_READS: Final = 141
"""Exit code that a shell reports for a program that SIGPIPE ended, as in `... | head`."""

TRACEBACK_FILE: Final = "traceback.txt"
"""In the run's output directory, or with a number in the system's directory for temporary files."""


def explain(error: BaseException, args: argparse.Namespace) -> int:
    """Say what ended a command, and what to do; returns the exit code."""
    config: TrainerConfig | None = getattr(args, "configuration", None)
    go_on = _what_goes_on(config) if args.command in ("run", "replay") else ""
    if config is not None and config.logging.level == "DEBUG":
        sys.stderr.write(printable("".join(traceback.format_exception(error)), lines=True))
    code = FAILED
    if isinstance(error, AnotherProcessFailed) and error.told:
        return code
    if isinstance(error, KeyboardInterrupt):
        said, code = "interrupted", INTERRUPTED
    elif isinstance(error, ConfigurationError):
        said, code = str(error), WRONG_USAGE
    elif isinstance(error, ImportError) and _is_not_installed(error.name):
        said, code = f"needs the package {error.name}, which is not installed", WRONG_USAGE
        said += ": pip install 'atropos-trainer[local]' brings all that the commands need"
    elif _is_out_of_memory(error):
        said = f"out of memory: {_first_line(error)}. Lower data.tokens_per_micro_batch, or set "
        said += f"model.gradient_checkpointing true{go_on}"
    elif isinstance(error, TrainerError | AtroposClientError):
        said = f"failed: {str(error).rstrip('.')}{go_on}"
    elif isinstance(error, OSError):
        said = f"failed: {_of_the_system(error)}{_at_the_output(error, config)}{go_on}"
    else:
        said = (
            f"failed: unexpected {type(error).__name__}: {_first_line(error)}. This is a bug; please report "
        )
        said += f"it with {_save_traceback(error, config)}{go_on}"
    with contextlib.suppress(OSError):
        rank = launched_rank()
        who = f"atropos-train {args.command}{f' [rank {rank}]' if rank else ''}"
        # Of the others process 0 says where they are, of itself nobody else does.
        if not (rank or isinstance(error, AnotherProcessFailed)) and launched_processes() > 1:
            who += f" [rank 0 on {socket.gethostname()}]"
        sys.stderr.write(f"{who}: {printable(said, lines=True)}\n")
    return code


def open_missing_streams() -> None:
    """Give a process that was started without standard streams (`>&-`) empty ones.

    The next file that it opens would have their numbers, and what is printed would end in it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def nobody_reads(error: BaseException) -> bool:
    """Whether the reader of standard output is gone, and a command ended by it; rich makes an exit of it."""
    if not (isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError)):
        return False
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def discard_output() -> None:
    """Let what is still to be written go nowhere, so that the interpreter's end does not complain."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, sys.stdout.fileno())
    os.close(descriptor)


_REMEDIES: Final = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EACCES: "give this user access",
    errno.EPERM: "give this user access",
    errno.EROFS: "choose a place that can be written to",
    errno.EEXIST: "it is no directory; choose another place",
    errno.ENOTDIR: "something on its way is no directory; choose another place",
    errno.ELOOP: "links lead in a circle; choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOMEM: "free memory",
}


def _of_the_system(error: OSError) -> str:
    """Say what the system refused, and what may help."""
    if error.strerror is None:
        return f"{type(error).__name__}: {error}"
    where = f"{error.filename}: " if error.filename is not None else ""
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{where}{error.strerror}{f'; {remedy}' if remedy else ''}"


def _at_the_output(error: OSError, config: TrainerConfig | None) -> str:
    """Name the setting, where what the system refused is the output directory or on the way to it."""
    if config is None or not isinstance(error.filename, str):
        return ""
    output = config.train.output_dir
    at_fault = output.absolute().is_relative_to(Path(error.filename).absolute())
    return f" (train.output_dir {output}; choose another)" if at_fault else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _is_not_installed(module: str | None) -> bool:
    return bool(module) and importlib.util.find_spec(str(module).partition(".")[0]) is None


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    of_a_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return of_a_gpu or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def how_to_go_on(config: TrainerConfig, checkpoint: Path) -> str:
    """Say what the same command does next."""
    again = "" if config.train.resume == "auto" else ", with --train.resume auto,"
    return f"the same command{again} goes on from {checkpoint}"


def _what_goes_on(config: TrainerConfig | None) -> str:
    """Name the newest checkpoint for the end of a message; nothing where there is none."""
    if config is None:
        return ""
    from trainer.checkpoints.retention import list_checkpoints
    from trainer.run.places import checkpoint_directory

    try:
        newest = list_checkpoints(checkpoint_directory(config))[-1]
    except (OSError, IndexError):
        return ""
    return f". After that {how_to_go_on(config, newest)}"


def _save_traceback(error: BaseException, config: TrainerConfig | None) -> str:
    text = "".join(traceback.format_exception(error))
    for path in _traceback_files(config):
        try:
            with open_private(path, "a") as file:
                file.write(printable(text, lines=True) + "\n")
        except OSError:
            continue
        return f"the traceback in {path}"
    sys.stderr.write(printable(text, lines=True))
    return "the traceback above"


def _traceback_files(config: TrainerConfig | None) -> Iterator[Path]:
    if config is not None and config.train.output_dir.is_dir():
        yield config.train.output_dir / TRACEBACK_FILE
    yield Path(tempfile.gettempdir()) / f"atropos-train-{os.getpid()}-{TRACEBACK_FILE}"

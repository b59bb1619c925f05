"""vLLM as the demonstration's inference server: is it installed, and how far has it started?

vLLM pins another version of transformers than ours, so it lives in an environment of its own and is started
by that environment's Python; `local_stack.commands` has the command.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from local_stack.errors import EngineMissingError

DEFAULT_PYTHON = Path(".venv-vllm/bin/python")
"""Where `make vllm` installs it, below the project's directory."""

_CHECK_TIMEOUT = 60.0
"""Finding a package takes milliseconds, but the interpreter may lie on a slow disk."""
_TAIL_BYTES = 1 << 20

# Lines of vLLM's log that open the next part of its start, and words for that part; in order.
_LANDMARKS = (
    ("non-default args", "reading the model's configuration"),
    ("Initializing a V1 LLM engine", "starting its engine"),
    ("Starting to load model", "loading the model"),
    ("Loading weights took", "making its cache"),
    ("Starting vLLM server", "opening its port"),
)


def require_vllm(python: Path) -> None:
    """Make sure that an interpreter has vLLM, without importing it (that takes 20 s).

    Raises:
        EngineMissingError: There is no such interpreter, or it has no vLLM.
    """
    advice = (
        "`make vllm` installs vLLM for the CPU into .venv-vllm of the project's directory; "
        "for another installation give its interpreter: --vllm-python PATH"
    )
    found_if_zero = "import sys, importlib.util as u; sys.exit(u.find_spec('vllm') is None)"
    try:
        done = subprocess.run(  # noqa: S603 - an argument list; the user names the interpreter
            [str(python), "-I", "-c", found_if_zero],
            capture_output=True,
            timeout=_CHECK_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineMissingError(f"vLLM's Python, {python}, cannot be run: {error}. {advice}") from error
    if done.returncode:
        raise EngineMissingError(f"{python} has no package vllm. {advice}")


def starting_part(log_path: Path) -> str:
    """Say what a vLLM server is doing while it starts, from its log.

    >>> starting_part(Path("does-not-exist"))
    'importing its libraries'
    """
    part = "importing its libraries"
    try:
        with log_path.open("rb") as log:
            text = log.read(_TAIL_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return part
    for landmark, words in _LANDMARKS:
        if landmark in text:
            part = words
    return part

"""Processes of our own modules that begin in a moment: forked from one that has loaded the libraries.

Loading torch and transformers takes seconds of computing, which would be most of many tests. That everything
loads by itself, and without a warning, is seen where a test starts Python.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers

import trainer.cli
import trainer.run.build

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.forked", "tests.chaos.trainer_run"])

# Loaded lazily, which would be done anew in every process.
LOADED = (transformers.LlamaForCausalLM, transformers.AutoTokenizer, trainer.run.build, trainer.cli)


class Forked:
    """`python -m MODULE WORDS` as `subprocess.Popen` starts it, with an output file in place of pipes.

    Args:
        module: Name of the module that is run.
        words: Its command line.
        stdout: What it prints is written there.
        stderr: Likewise; None: to `stdout` too.
        environment: All its environment variables. None: those of this process.
        umask: Its mask for new files. None: that of this process.
    """

    def __init__(
        self,
        module: str,
        words: Sequence[object],
        *,
        stdout: Path,
        stderr: Path | None = None,
        environment: Mapping[str, str] | None = None,
        umask: int | None = None,
    ) -> None:
        stdout.touch()
        told = (dict(os.environ if environment is None else environment), os.getcwd(), umask)  # noqa: PTH109
        argument = (module, [str(word) for word in words], stdout, stderr or stdout, *told)
        self._process = PROCESSES.Process(target=_run, args=argument)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def send_signal(self, number: int) -> None:
        """Send a signal to it."""
        if self._process.is_alive():
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def poll(self) -> int | None:
        """Its exit status, negative if a signal ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its exit status.

        Raises:
            TimeoutExpired: It still runs.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return self._process.exitcode


def forked_ranks(
    count: int, port: int, module: str, words: Sequence[object], *, stdout: Path, stderr: Path
) -> list[Forked]:
    """Start the processes of one run, as torchrun starts them; they write to the same files."""
    together = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_WORLD_SIZE": 1, "GROUP_RANK": 0}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "COLUMNS": 200}
    processes = []
    for rank in range(count):
        variables = {**together, **where, "RANK": rank, "LOCAL_RANK": rank}
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        processes.append(Forked(module, words, stdout=stdout, stderr=stderr, environment=environment))
    return processes


def run_module(
    module: str, *words: object, timeout: float = 120, **others: Any
) -> subprocess.CompletedProcess[str]:
    """Run a module to its end; the rest is as of `Forked`."""
    with tempfile.TemporaryDirectory() as directory:
        stdout, stderr = Path(directory, "out"), Path(directory, "errors")
        process = Forked(module, words, stdout=stdout, stderr=stderr, **others)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        printed = [path.read_bytes().decode() for path in (stdout, stderr)]
    return subprocess.CompletedProcess([module, *map(str, words)], code, *printed)


def _run(
    module: str,
    words: list[str],
    stdout: Path,
    stderr: Path,
    environment: dict[str, str],
    directory: str,
    umask: int | None,
) -> None:
    """Become the process: in the child."""
    for descriptor, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    if umask is not None:
        os.umask(umask)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [each for each in environment.get("PYTHONPATH", "").split(os.pathsep) if each]
    os.chdir(directory)
    warnings.simplefilter("error")
    # As in pyproject.toml: PEFT asks transformers by an old name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)

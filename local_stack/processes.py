"""Child processes that never outlive the launcher.

A `ChildProcess` runs one service: an argument list (never a shell string), its own session, so that the
terminal's Ctrl-C reaches only the launcher, and one log file for all it says. Three rules hold:

- Only processes that were started here are ever signalled, by the id they were started with.
- Children of a child end with it: what is left of its process group is killed when it ends.
- If the launcher itself is killed, the kernel kills its children (Linux; see `_tied_exec`), and a watchdog
  the children of those that are said to have some.

A process's id stays reserved until its parent collects it. So a child that has ended is recognised without
collecting it (it is a zombie then), its group is killed while the id cannot belong to anyone else, and only
then is it collected.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from local_stack.errors import NotReadyError, ProcessDiedError

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.1
"""Pause between two looks at what is watched."""
_TAIL_LINES = 15
_TAIL_BYTES = 64 * 1024


class ChildProcess:
    """One running service.

    Args:
        name: What messages call it.
        command: Program and arguments.
        log_path: File that standard output and standard error are appended to.
        environment: Variables set on top of the launcher's own.
        stop_signal: What asks it to end by itself.
        may_finish: Whether ending with status 0 is what it should do some time.
        has_children: Whether it starts processes that may outlive it.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log_path: Path,
        environment: Mapping[str, str] | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        may_finish: bool = False,
        has_children: bool = False,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._stop_signal = stop_signal
        self._may_finish = may_finish
        self._returncode: int | None = None
        log_path.parent.mkdir(parents=True, exist_ok=True)
        tied = [sys.executable, "-I", "-S", str(Path(__file__).with_name("_tied_exec.py")), str(os.getpid())]
        if has_children:
            tied.append("--with-children")
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - an argument list made by this package
                [*tied, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process id, which is also the id of its session and process group."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        if self._returncode is None and psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE:
            self._kill_group()
        return self._returncode

    def require_healthy(self) -> None:
        """Raise `ProcessDiedError`, with the end of the log, if the process has ended as it should not."""
        status = self.returncode
        if status is not None and not (status == 0 and self._may_finish):
            raise ProcessDiedError(f"the {self.name} {describe_status(status)}.\n{self.log_tail()}")

    def ask_to_stop(self) -> None:
        """Send the stop signal to the process (not to its children: it knows best how to end them)."""
        if self.returncode is None:
            # Not by `Popen.send_signal`, which collects a process that has just ended: its group would go on
            # and its id could belong to anyone.
            os.kill(self.pid, self._stop_signal)

    def kill(self) -> None:
        """End the process and its whole group at once."""
        if self.returncode is None:
            self._kill_group()

    def stop(self, patience: float) -> int:
        """Ask the process to end, wait at most `patience` seconds, then kill it; returns its exit status."""
        self.ask_to_stop()
        return self.wait(patience)

    def wait(self, patience: float, *, hurry: Callable[[], bool] = lambda: False) -> int:
        """Wait until the process has ended, then return its exit status.

        Args:
            patience: Seconds after which it is killed, with its group.
            hurry: Checked while waiting; once true, the process is killed without waiting on.
        """
        deadline = time.monotonic() + patience
        while (status := self.returncode) is None:
            if hurry() or time.monotonic() > deadline:
                logger.warning("the %s (process %d) did not end in time; killing it", self.name, self.pid)
                self.kill()
            else:
                time.sleep(WATCH_SECONDS)
        return status

    def log_tail(self, lines: int = _TAIL_LINES) -> str:
        """Return the end of the log under a heading that says where the whole log is."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, self.log_path.stat().st_size - _TAIL_BYTES))
                text = log.read().decode("utf-8", errors="replace")
        except OSError as error:
            return f"Its log {self.log_path} cannot be read: {error.strerror}."
        tail = text.rstrip().splitlines()[-lines:]
        if not tail:
            return f"Its log {self.log_path} is empty."
        return "\n".join([f"The end of its log ({self.log_path}):", *(f"  {line}" for line in tail)])

    def _kill_group(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        except PermissionError:  # what macOS answers for a group in which only zombies are left
            logger.debug("the process group of %s holds nothing that can be signalled", self.name)
        self._returncode = self._process.wait()


class Services:
    """The child processes of one run: started by name, watched together.

    Args:
        log_dir: Each service logs into `<name>.log` here.
        environment: Variables set for every service.
    """

    def __init__(self, log_dir: Path, *, environment: Mapping[str, str]) -> None:
        self._log_dir = log_dir
        self._environment = environment
        self._children: dict[str, ChildProcess] = {}

    def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None, **options: Any
    ) -> ChildProcess:
        """Start a service, watched from now on; further `options` are those of `ChildProcess`."""
        variables = {**self._environment, **(environment or {})}
        log_path = self._log_dir / f"{name.replace(' ', '-').lower()}.log"
        child = ChildProcess(name, command, log_path=log_path, environment=variables, **options)
        self._children[name] = child
        return child

    def require_all_healthy(self) -> None:
        """Raise `ProcessDiedError` for the first service, in the order of starting, that is not."""
        for child in self._children.values():
            child.require_healthy()

    def stop(self, patience: Mapping[str, float], *, hurry: Callable[[], bool] = lambda: False) -> None:
        """Ask services to end, all at once, and wait for each of them.

        Args:
            patience: Seconds that each may take before it is killed, by name; ended ones are passed over.
            hurry: Once true, everything is killed without waiting on.
        """
        asked = [self._children[name] for name in patience if name in self._children]
        started = time.monotonic()
        for child in asked:
            child.ask_to_stop()
        for child in asked:
            child.wait(max(0.0, started + patience[child.name] - time.monotonic()), hurry=hurry)
            del self._children[child.name]

    def kill_all(self) -> None:
        """End everything at once."""
        for child in self._children.values():
            child.kill()
        self._children.clear()


def wait_until(
    child: ChildProcess, is_ready: Callable[[], bool], *, timeout: float, what: str, watch: Callable[[], None]
) -> None:
    """Return once `is_ready()`.

    Args:
        child: The process that is waited for, named in the message if it takes too long.
        is_ready: Asked about every tenth of a second.
        timeout: Seconds to wait.
        what: What is waited for, in words that complete "did not ... within".
        watch: Called just as often; what it raises, e.g. that a process has died, ends the wait.

    Raises:
        NotReadyError: It was not ready in time.
    """
    deadline = time.monotonic() + timeout
    while not is_ready():
        watch()
        if time.monotonic() > deadline:
            raise NotReadyError(f"the {child.name} did not {what} within {timeout:g} s.\n{child.log_tail()}")
        time.sleep(WATCH_SECONDS)


def describe_status(status: int) -> str:
    """Put an exit status into words that follow a subject: `ended with exit status 3`."""
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"

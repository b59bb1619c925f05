"""Drives the stack of docker-compose.yml by the commands that a user types."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

from tests.compose import ROOT

SERVICES = ("atropos-api", "inference", "environment", "trainer")
IMAGE = "atropos-trainer:cpu"
PATIENCE = 1800.0  # seconds; only ends a hang

Row = dict[str, Any]


class Stack:
    """The services of the profile cpu.

    Args:
        program: docker-compose.
        project: Name of containers, network and volume.
    """

    def __init__(self, program: list[str], *, project: str) -> None:
        self._program = [*program, "-p", project]
        self._project = project
        self._environment = {**os.environ, "COMPOSE_PROFILES": "cpu"}
        self._up: subprocess.Popen[bytes] | None = None

    def configure(self, **variables: object) -> None:
        """Set variables of .env, as one does on the command line."""
        self._environment |= {name: str(value) for name, value in variables.items()}

    def compose(self, *words: str) -> str:
        """Run one docker-compose command to its end; returns its standard output."""
        done = subprocess.run(
            [*self._program, *words],
            cwd=ROOT,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, f"docker-compose {' '.join(words)}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def up(self, *options: str) -> None:
        """Start `docker-compose up` in the foreground, as in a terminal."""
        self._up = subprocess.Popen(
            [*self._program, "up", *options], cwd=ROOT, env=self._environment, start_new_session=True
        )

    def press_ctrl_c(self) -> None:
        """Send what the terminal sends."""
        assert self._up is not None
        os.killpg(self._up.pid, signal.SIGINT)

    def wait_for_end(self) -> int:
        """Wait for `docker-compose up`; returns its exit code."""
        assert self._up is not None
        return self._up.wait(PATIENCE)

    def containers(self) -> dict[str, str]:
        """Ids of the containers that exist, by service."""
        found = {name: self.compose("ps", "-a", "-q", name).strip() for name in SERVICES}
        return {name: identity for name, identity in found.items() if identity}

    def running(self) -> set[str]:
        """Services whose container runs."""
        return {name for name in self.containers() if self.inspect(name)["State"]["Running"]}

    def inspect(self, name: str) -> Row:
        """What the engine knows of a service's container."""
        found: list[Row] = json.loads(docker("inspect", self.containers()[name]))
        return found[0]

    def rows(self, kind: str) -> list[Row]:
        """Rows of the run's metrics.jsonl, read from the volume; none before it exists."""
        text = self.in_volume("cat", "/data/run/metrics.jsonl")
        return [row for row in map(json.loads, text.splitlines()) if row["kind"] == kind]

    def in_volume(self, *words: str) -> str:
        """Run a command beside the volume; what it prints, and nothing if it fails."""
        with contextlib.suppress(AssertionError):
            return docker("run", "--rm", "-v", f"{self._project}_data:/data:ro", IMAGE, *words)
        return ""

    def wait(self, condition: Callable[[], bool], *, what: str) -> None:
        """Wait for something, unless `docker-compose up` ends before."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"did not {what}:\n{self.compose('logs', '--tail', '30')}"
            assert self._up is None or self._up.poll() is None, f"ended before it could {what}"
            time.sleep(2)

    def wait_for_steps(self, more: int) -> None:
        """Wait until so many further steps are trained."""
        goal = len(self.rows("step")) + more
        self.wait(lambda: len(self.rows("step")) >= goal, what=f"reach step {goal}")

    def close(self) -> None:
        """End everything, and remove containers, network and volume."""
        if self._up is not None and self._up.poll() is None:
            self._up.kill()
            self._up.wait()
        self.compose("down", "--volumes", "--timeout", "5")


def docker(*words: str) -> str:
    """Run one docker command; returns its standard output."""
    done = subprocess.run(["docker", *words], capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, f"docker {' '.join(words)}:\n{done.stdout}\n{done.stderr}"
    return done.stdout

"""A Docker engine for the tests of this folder, or the reason why there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.compose import compose_program
from tests.docker.stack import Stack


@pytest.fixture(scope="session")
def program() -> list[str]:
    """docker-compose, once it is known that an engine answers."""
    program = compose_program()
    problem = None
    if program is None or not shutil.which("docker"):
        problem = "docker or docker-compose is not installed"
    else:
        engine = subprocess.run(["docker", "info"], capture_output=True, text=True, check=False, timeout=60)
        if engine.returncode != 0:
            problem = f"no Docker engine answers: {(engine.stderr or engine.stdout).strip()[-300:]}"
    if problem is not None:
        (pytest.fail if os.environ.get("REQUIRE_DOCKER") else pytest.skip)(problem)
    assert program is not None
    return program


@pytest.fixture
def stack(program: list[str]) -> Iterator[Stack]:
    """The stack under a project name of its own; its containers and its volume are removed at the end."""
    stack = Stack(program, project=f"atropos-test-{os.getpid()}")
    yield stack
    stack.close()

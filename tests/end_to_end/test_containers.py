"""The commands of docker-compose.yml, run directly: other host names and paths, nothing else changed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from local_stack.commands import Address
from local_stack.processes import ChildProcess, wait_until
from local_stack.services import free_addresses
from tests.compose import ROOT, read_services
from tests.end_to_end.launching import DEADLINE

HEALTH_PORT = "ATROPOS_TRAINER_HEALTH__PORT"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class DirectStack:
    """The services of the profile cpu as processes on this machine."""

    def __init__(self, data: Path, model: Path, *, steps: int) -> None:
        self.services = read_services(MODEL=str(model), STEPS=str(steps))
        self._data = data
        api, inference, trainer = free_addresses(3)
        self._addresses = {"atropos-api": api, "inference": inference, "trainer": trainer}
        self._children: dict[str, ChildProcess] = {}

    def start(self, name: str) -> None:
        """Run a service's command once those it needs are healthy."""
        for needed in self.services[name].get("depends_on", {}):
            self.wait_until_healthy(needed)
        self._children[name] = ChildProcess(
            name,
            self._here(self.services[name]["command"], name),
            log_path=self._data / "logs" / f"{name}.log",
            environment=self._environment(name),
            stop_signal=signal.Signals[self.services[name].get("stop_signal", "SIGTERM")],
            may_finish=name == "trainer",
        )

    def status(self, name: str) -> int | None:
        """Exit status of a service; None while it runs."""
        return self._children[name].returncode

    def is_healthy(self, name: str) -> bool:
        """Run a service's own health check."""
        kind, *check = self.services[name]["healthcheck"]["test"]
        assert kind == "CMD"
        return subprocess.run(self._here(check, name), cwd=ROOT, check=False, timeout=60).returncode == 0

    def wait_until_healthy(self, name: str) -> None:
        """Wait for a service's health check to succeed."""
        self.wait(name, lambda: self.is_healthy(name), what="become healthy")

    def wait(self, name: str, condition: Callable[[], bool], *, what: str) -> None:
        """Wait for something of a service while all of them are well."""
        wait_until(
            self._children[name], condition, timeout=DEADLINE, what=what, watch=self.require_all_healthy
        )

    def require_all_healthy(self) -> None:
        """Raise if a service has died."""
        for child in self._children.values():
            child.require_healthy()

    def kill_all(self) -> None:
        """End everything."""
        for child in self._children.values():
            child.kill()

    def _environment(self, name: str) -> dict[str, str]:
        environment: dict[str, str] = dict(self.services[name]["environment"])
        if HEALTH_PORT in environment:
            environment[HEALTH_PORT] = str(self._addresses[name].port)
        return environment

    def _here(self, words: list[str], service: str) -> list[str]:
        """Put this machine's addresses and paths in place of the containers' own."""
        own = self._addresses.get(service)
        placed = []
        for position, word in enumerate(words):
            if position == 0:
                assert word == "python"
                placed.append(sys.executable)
            elif words[position - 1] == "--host":
                placed.append("127.0.0.1")
            elif words[position - 1] == "--port":
                assert own is not None
                placed.append(str(own.port))
            else:
                placed.append(self._located(word, own))
        return placed

    def _located(self, word: str, own: Address | None) -> str:
        if own is not None:
            word = re.sub(r"http://127\.0\.0\.1:\d+", own.url, word)
        for host, address in self._addresses.items():
            word = re.sub(rf"http://{host}:\d+", address.url, word)
        return re.sub(r"^/data/", f"{self._data}/", word)


@pytest.fixture
def stack(
    tmp_path: Path, tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[DirectStack]:
    monkeypatch.chdir(ROOT)  # as in the image, where configs/ lies in the working directory
    stack = DirectStack(tmp_path, tiny_model_directory, steps=2)
    yield stack
    stack.kill_all()


def test_the_containers_commands_train_publish_and_end(stack: DirectStack, tmp_path: Path) -> None:
    assert not stack.is_healthy("atropos-api")
    for name in ("atropos-api", "inference", "trainer", "environment"):
        stack.start(name)
    stack.wait_until_healthy("trainer")
    stack.wait_until_healthy("environment")
    stack.wait("trainer", lambda: stack.status("trainer") == 0, what="finish")

    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [1, 2]
    publishes = [row for row in rows if row["kind"] == "publish" and row["version"] > 0]
    assert [row["version"] for row in publishes] == [1, 2]
    assert all(row["publish_verified"] is True for row in publishes)
    assert (run / "final" / "model.safetensors").is_file()
    assert (run / "evaluations" / "before" / "metrics.json").is_file()

"""An environment that never ends, and an inference server that is killed and started again."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any, Self

import httpx

from atropos_client import AtroposClient, AtroposClientError
from schemas import EnvironmentRegistration
from tests.atropos_client.misbehaving_server import closed_port
from tests.trainer.batches import VOCABULARY, make_group

GROUP_SIZE = 4
_PATIENCE = 120.0
_HOSTILE_SHARE = 0.03


class EndlessEnvironment:
    """Keeps a few groups in the API's queue, some of them hostile; registers again after a restart.

    Args:
        url: The API itself: what this environment loses is not the trainer's to account for.
        queued: Sequences that it keeps in the queue.
    """

    def __init__(self, url: str, *, queued: int, seed: int) -> None:
        self._url, self._queued = url, queued
        self._generator = random.Random(seed)
        self.pushed = 0
        """Groups that the API took."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="environment")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        registration = EnvironmentRegistration(
            max_token_length=64, desired_name="endless", group_size=GROUP_SIZE
        )
        accepted = False
        with AtroposClient(self._url) as client:
            while not self._stop.wait(0.02):
                try:
                    if not client.info().registered:
                        accepted = False
                        continue
                    accepted = accepted or client.register_environment(registration).accepted
                    if accepted and client.status().queue_size < self._queued:
                        self._push()
                except (AtroposClientError, httpx.HTTPError):
                    accepted = False  # it was killed
                    self._stop.wait(0.2)

    def _push(self) -> None:
        groups = [self._group() for _ in range(4)]
        reply = httpx.post(f"{self._url}/scored_data_list", json=groups, timeout=_PATIENCE, trust_env=False)
        self.pushed += len(groups) if reply.is_success else 0

    def _group(self) -> dict[str, Any]:
        group = make_group(self._generator, size=GROUP_SIZE)
        if self._generator.random() < _HOSTILE_SHARE:
            group["tokens"][0][-1] = VOCABULARY + 1000
            group["masks"][0][-1] = VOCABULARY + 1000
        return group


class InferenceProcess:
    """The embedded inference server in a process of its own. Use as a context manager."""

    def __init__(self, model: Path, log: IO[bytes]) -> None:
        self._model, self._log = model, log
        self._port = closed_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it and wait until it serves."""
        command = [sys.executable, "-m", "local_stack.inference", "--model", str(self._model)]
        command += ["--served-model-name", "tiny", "--port", str(self._port), "--threads", "1"]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        deadline = time.monotonic() + _PATIENCE
        while not self._healthy():
            assert self._process.poll() is None, "the inference server has ended"
            assert time.monotonic() < deadline, "the inference server did not start"
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5, trust_env=False).is_success
        except httpx.HTTPError:
            return False

"""Fixtures for every test: a tiny model on disk, a free port, and a real inference server."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import pytest
from accelerate.state import AcceleratorState

from local_stack.inference import Engine, EngineSettings, InferenceServer
from local_stack.models import make_tiny_model
from tests.ports import free_port

_START_TIMEOUT = 60.0
_TORCHAO = Path(__file__).parents[1] / ".venv-torchao"


@dataclass(frozen=True)
class RunningInferenceServer:
    """An embedded inference server that listens on loopback, in a thread of this process."""

    url: str
    """Base URL without `/v1`."""
    model_name: str
    model_directory: Path
    engine: Engine
    client: httpx.Client
    """A client with `url` as its base."""
    server: InferenceServer

    def stop(self) -> None:
        """Tell it to stop, as a signal does."""
        self.server.should_exit = True

    def post(self, path: str, body: Any = None, **parameters: Any) -> httpx.Response:
        """Post JSON and return the response, whatever its status."""
        return self.client.post(path, json=body, params=parameters)

    def complete(self, prompt: Any, **fields: Any) -> list[dict[str, Any]]:
        """Choices of a completion with token ids and log-probs."""
        body = {"model": self.model_name, "prompt": prompt, "return_token_ids": True, "logprobs": 0, **fields}
        response = self.post("/v1/completions", body)
        assert response.status_code == 200, response.text
        choices: list[dict[str, Any]] = response.json()["choices"]
        return choices


def pytest_configure() -> None:
    """Let a lost terminal end programs as usual, also where the tests were started by nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking through torch and transformers again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Commands configure the logging of their process, which here is that of all tests."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(autouse=True)
def _accelerate_as_before() -> Iterator[None]:
    """Accelerate fixes the mixed precision once a process, which here is that of all tests."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def tiny_model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a byte-level tokenizer (259 tokens); shared, so do not write to it."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(name="free_port")
def _free_port() -> int:
    return free_port()


@pytest.fixture
def start_inference_server() -> Iterator[Callable[..., RunningInferenceServer]]:
    """Start servers for one test: call it with a model directory and fields of `EngineSettings`."""
    with contextlib.ExitStack() as stack:

        def start(
            directory: Path,
            *,
            model_name: str = "tiny",
            engine_class: type[Engine] = Engine,
            **settings: Any,
        ) -> RunningInferenceServer:
            return stack.enter_context(running_server(directory, model_name, settings, engine_class))

        yield start


@pytest.fixture
def inference_server(
    tiny_model_directory: Path, start_inference_server: Callable[..., RunningInferenceServer]
) -> RunningInferenceServer:
    """A server of its own for every test, with the tiny model under the name `tiny`."""
    return start_inference_server(tiny_model_directory)


@pytest.fixture(scope="session")
def shared_inference_server(tiny_model_directory: Path) -> Iterator[RunningInferenceServer]:
    """Like `inference_server`, one for the whole session: only for tests that leave its state alone."""
    with running_server(tiny_model_directory) as server:
        yield server


@contextlib.contextmanager
def running_server(
    directory: Path,
    model_name: str = "tiny",
    settings: Mapping[str, Any] = MappingProxyType({}),
    engine_class: type[Engine] = Engine,
) -> Iterator[RunningInferenceServer]:
    """Serve a model until the context is left, with fields of `EngineSettings`."""
    engine = engine_class(EngineSettings(model=str(directory), **settings))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = InferenceServer(engine, model_name=model_name, host="127.0.0.1", port=0)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="inference-server")
        thread.start()
        try:
            with httpx.Client(base_url=url, timeout=60.0) as client:
                _wait_until(lambda: server.started or not thread.is_alive())
                yield RunningInferenceServer(url, model_name, directory, engine, client, server)
        finally:
            server.should_exit = True
            thread.join(_START_TIMEOUT)
            assert not thread.is_alive(), "the inference server did not stop"


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "the inference server did not start"
        time.sleep(0.01)


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages of `.venv-torchao`, here and in processes that are started; its step is not compiled.

    Compiling takes a minute; eagerly the step computes the same, from other random numbers.
    """
    if not (_TORCHAO / "torchao").is_dir():
        pytest.skip("torchao is not installed beside .venv: make test does it")
    if str(_TORCHAO) not in sys.path:  # and it stays there: modules that were imported know where they are
        sys.path.append(str(_TORCHAO))
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(_TORCHAO), *([before] if before else [])]))
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")

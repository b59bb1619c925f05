"""Stock vLLM on the CPU as a child process, with our middleware: started, killed, started again, stopped."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil

from tests.compose import ROOT

VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
"""vLLM needs another version of transformers than the trainer, so it lives in an environment of its own."""
SERVED_NAME = "policy"
START_TIMEOUT = 240.0
"""Seconds until `/health` answers: about 20 with a tiny model, more on a machine that is busy."""
_STOP_TIMEOUT = 30.0
# Not lm_head: with it, vLLM 0.32 on the CPU dies of prompt log-probs asked for beside other requests.
_LORA_FLAGS = (
    *("--enable-lora", "--max-lora-rank", "16", "--max-loras", "2", "--lora-target-modules"),
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
_MARK = "ATROPOS_VLLM_TEST"


class VllmServer:
    """A vLLM server on a loopback port of its own; it is not running until `start`.

    Args:
        model: Directory of the model. Its attention heads must have a size that vLLM's attention for the CPU
            takes: 32, 64, 80, 96, 112, 128, 192 or 256.
        log: File for its output; every start appends.
        dtype: Name of the type that it computes in.
        lora: Whether adapters can be loaded at run time.
        api_key: What callers of `/v1/...` have to present; None for nothing.
        flags: Further words of the command line.
        environment: Further environment variables; None removes one.
        middleware: Import path of the class that adds `/generate`; PYTHONPATH has to fit.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        *,
        dtype: str = "float32",
        lora: bool = False,
        api_key: str | None = None,
        flags: Sequence[str] = (),
        environment: dict[str, str | None] | None = None,
        middleware: str = "atropos_generate.AtroposGenerate",
    ) -> None:
        self.model = model
        self.log = log
        self.api_key = api_key
        self.port = _free_port()
        self._dtype = dtype
        self._flags = [*(_LORA_FLAGS if lora else ()), *flags]
        self._environment = environment or {}
        self._middleware = middleware
        self._mark = secrets.token_hex(8)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Base URL without `/v1`."""
        return f"http://127.0.0.1:{self.port}"

    def client(self, *, timeout: float = 120.0) -> httpx.Client:
        """A client with `url` as its base and the API key; the caller closes it."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return httpx.Client(base_url=self.url, timeout=timeout, headers=headers)

    def post(self, path: str, body: Any = None, **parameters: Any) -> httpx.Response:
        """Post JSON and return the response, whatever its status."""
        with self.client() as client:
            return client.post(path, json=body, params=parameters)

    def get(self, path: str, **parameters: Any) -> httpx.Response:
        """Get and return the response, whatever its status."""
        with self.client() as client:
            return client.get(path, params=parameters)

    def metric(self, name: str, labels: str = "") -> float:
        """Sum of a metric in `/metrics` over the engines, of the lines that have `labels` in them."""
        lines = self.get("/metrics").text.splitlines()
        values = [line.rsplit(" ", 1) for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        return sum(float(value) for head, value in values if labels in head)

    def start(self, *, wait: bool = True) -> Self:
        """Start it and, unless told otherwise, wait until it is ready and warm."""
        assert self._process is None, "it was started already"
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.log.parent,
                env=self._child_environment(),
                start_new_session=True,
            )
        if wait:
            self.wait_until_ready()
        return self

    def wait_until_ready(self, timeout: float = START_TIMEOUT) -> None:
        """Wait for `/health`, then for a first token and log-probs: vLLM compiles its kernels for that.

        Raises:
            AssertionError: It ended or took too long; the message has the end of its log.
        """
        self._wait_until(self._is_healthy, timeout, "was healthy")
        first = {"model": SERVED_NAME, "prompt": [1, 2], "max_tokens": 1, "prompt_logprobs": 0}
        with self.client(timeout=timeout) as client:
            reply = client.post("/v1/completions", json=first)
        assert reply.status_code == 200, f"the first completion failed: {reply.text}\n{self.log_end()}"

    def kill(self) -> None:
        """SIGKILL to the whole group at once, the process that computes included; wait until it is gone."""
        if self._process is None:
            return
        left = self._processes()
        with contextlib.suppress(ProcessLookupError):  # all of it is gone already
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(_STOP_TIMEOUT)
        psutil.wait_procs(left, timeout=_STOP_TIMEOUT)
        left = self._processes()
        for process in left:
            process.kill()
        self._process = None
        assert not left, f"these left vLLM's process group and had to be killed one by one: {left}"

    def restart(self, *, wait: bool = True) -> Self:
        """Kill what may still run and start it again on the same port, with the model it began with."""
        self.kill()
        return self.start(wait=wait)

    def close(self) -> None:
        """Ask it to stop, as an operator does, and kill what does not."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_TIMEOUT)
            self.kill()

    def log_end(self, lines: int = 60) -> str:
        """The last lines of its output."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _command(self) -> list[str]:
        return [
            *(str(VLLM_PYTHON), "-m", "vllm.entrypoints.openai.api_server"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--model", str(self.model), "--served-model-name", SERVED_NAME),
            *("--dtype", self._dtype, "--max-model-len", "2048", "--max-num-seqs", "32", "--enforce-eager"),
            *("--middleware", self._middleware),
            *self._flags,
        ]

    def _child_environment(self) -> dict[str, str]:
        settings: dict[str, str | None] = {
            **os.environ,
            _MARK: self._mark,
            "PYTHONPATH": str(ROOT / "inference_plugins"),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_WAIT_POLICY": "passive",  # threads that spin while they wait take the cores from others
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_API_KEY": self.api_key,
            **self._environment,
        }
        return {name: value for name, value in settings.items() if value is not None}

    def _is_healthy(self) -> bool:
        try:
            return self.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def _wait_until(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        assert self._process is not None, "it was not started"
        deadline = time.monotonic() + timeout
        while not condition():
            status = self._process.poll()
            assert status is None, f"vLLM ended with {status} before it {what}:\n{self.log_end()}"
            assert time.monotonic() < deadline, f"{timeout:.0f} s until vLLM {what}:\n{self.log_end()}"
            time.sleep(0.2)

    def _processes(self) -> list[psutil.Process]:
        """Everything that inherited our mark, whatever group it is in."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:  # it ended meanwhile, or is somebody else's
            return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

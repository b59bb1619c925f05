"""Stock vLLM on the CPU as a child process, with our middleware: started, killed, started again, stopped."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import httpx

from local_stack.processes import ChildProcess, wait_until
from tests.compose import ROOT
from tests.ports import free_port

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
        environment: Further environment variables; None leaves one out that is set here.
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
        self.port = free_port()
        self._dtype = dtype
        self._flags = [*(_LORA_FLAGS if lora else ()), *flags]
        self._environment = environment or {}
        self._middleware = middleware
        self._child: ChildProcess | None = None

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

    def start(self) -> Self:
        """Start it and wait until it is ready and warm."""
        self._child = ChildProcess(
            "vLLM server",
            self._command(),
            log_path=self.log,
            environment=self._child_environment(),
            stop_signal=signal.SIGINT,
            has_children=True,
        )
        wait_until(
            self._child,
            self._is_healthy,
            timeout=START_TIMEOUT,
            what="become healthy",
            watch=self._child.require_healthy,
        )
        # vLLM compiles its kernels for the first token and its log-probs.
        first = {"model": SERVED_NAME, "prompt": [1, 2], "max_tokens": 1, "prompt_logprobs": 0}
        with self.client(timeout=START_TIMEOUT) as client:
            reply = client.post("/v1/completions", json=first)
        said = f"{reply.text}\n{self._child.log_tail(60)}"
        assert reply.status_code == 200, f"the first completion failed: {said}"
        return self

    def kill(self) -> None:
        """SIGKILL to the whole group at once, the process that computes included."""
        assert self._child is not None
        self._child.kill()

    def close(self) -> None:
        """Ask it to stop, as an operator does, and kill what does not."""
        if self._child is not None:
            self._child.stop(_STOP_TIMEOUT)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
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

"""The command of every service, as a list of arguments: one place, used by launcher, tests and containers.

A test holds that `docker-compose.yml` runs exactly these, with its own host names and paths.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

SERVED_MODEL_NAME = "policy"
"""Name of the model in training at the inference server; environments ask for it by this name."""
MAX_MODEL_LENGTH = 512
"""Longest sequence, in tokens, that the demonstration's inference server holds."""
MAX_SEQUENCES_AT_ONCE = 128
"""Sequences that the inference server generates at once: a training batch (96) and some."""
_EVALUATIONS = "--env.data_dir_to_save_evals"
_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LISTENING_PORTS = range(20_000, 32_768)
"""Ports that Linux gives to no outgoing connection, unless `net.ipv4.ip_local_port_range` was changed."""
VLLM_PLUGINS = Path(__file__).resolve().parent.parent / "inference_plugins"
"""Files of ours that vLLM loads, found through `PYTHONPATH`."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a service listens."""

    port: int
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        """Base URL, without a trailing slash."""
        return f"http://{self.host}:{self.port}"


def free_addresses(count: int) -> list[Address]:
    """Return `count` different loopback addresses that nothing listens on at this moment.

    Of ports below those that a kernel gives to connections: one of those could be some connection's by the
    time that the service listens.
    """
    found: list[Address] = []
    with contextlib.ExitStack() as held:
        for port in random.SystemRandom().sample(LISTENING_PORTS, len(LISTENING_PORTS)):
            with contextlib.suppress(OSError):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
                found.append(Address(port=port))
            if len(found) == count:
                return found
    raise OSError(f"fewer than {count} ports of {LISTENING_PORTS} are free on 127.0.0.1")


def api_command(listen: Address, *, python: str = sys.executable) -> list[str]:
    """Return the command of the Atropos API server."""
    return [
        *(python, "-m", "uvicorn", "atroposlib.api.server:app"),
        *("--host", listen.host),
        *("--port", str(listen.port)),
        # Environments ask for the queue ten times a second; warnings and errors are still logged.
        "--no-access-log",
    ]


def inference_command(listen: Address, *, model: str, seed: int, python: str = sys.executable) -> list[str]:
    """Return the command of the embedded inference server, serving `model` as `SERVED_MODEL_NAME`."""
    return [
        *(python, "-m", "local_stack.inference"),
        *("--model", model),
        *("--served-model-name", SERVED_MODEL_NAME),
        *("--host", listen.host),
        *("--port", str(listen.port)),
        *("--max-model-len", str(MAX_MODEL_LENGTH)),
        *("--max-num-seqs", str(MAX_SEQUENCES_AT_ONCE)),
        *("--seed", str(seed)),
    ]


def vllm_command(
    listen: Address,
    *,
    model: str,
    seed: int,
    python: str,
    dtype: str = "float32",
    lora_rank: int | None = None,
) -> list[str]:
    """Return the command of a stock vLLM server for the CPU that serves `model` as `SERVED_MODEL_NAME`.

    Args:
        listen: Where it listens.
        model: Directory or hub id of the model.
        seed: Of its sampling.
        python: Interpreter of the environment that vLLM is installed in.
        dtype: Type that it computes in; in float32 its log-probs are the trainer's to five digits.
        lora_rank: Largest rank of adapters that it takes at run time; None: no adapters.
    """
    adapters: tuple[str, ...] = ()
    if lora_rank is not None:
        # Two: the one that is served, and the next while it is proven. Not on the output layer: with it
        # vLLM 0.32 on the CPU dies of prompt log-probs that are asked for beside other requests.
        adapters = ("--enable-lora", "--max-lora-rank", str(lora_rank), "--max-loras", "2")
        adapters += ("--lora-target-modules", *_LORA_TARGETS)
    return [
        *(python, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", model),
        *("--served-model-name", SERVED_MODEL_NAME),
        *("--host", listen.host),
        *("--port", str(listen.port)),
        *("--dtype", dtype),
        *("--max-model-len", str(MAX_MODEL_LENGTH)),
        *("--max-num-seqs", str(MAX_SEQUENCES_AT_ONCE)),
        # Small blocks let short prompts share what they begin with (the default for CPUs is 128 tokens).
        *("--block-size", "32"),
        "--enforce-eager",  # compiling takes longer than it saves here
        *("--seed", str(seed)),
        *("--middleware", "atropos_generate.AtroposGenerate"),
        # Only on the CPU: without it vLLM keeps an old output layer where it shares the embedding's weights.
        *("--worker-cls", "atropos_cpu_worker.AtroposCPUWorker"),
        # Verification learns from it whether anything was left in the prefix cache.
        "--enable-prompt-tokens-details",
        # Environments ask for the version ten times a second; warnings and errors are still logged.
        "--disable-uvicorn-access-log",
        *adapters,
    ]


def vllm_environment() -> dict[str, str]:
    """Return the environment variables of `vllm_command`."""
    inherited = os.environ.get("PYTHONPATH")
    return {
        "PYTHONPATH": f"{VLLM_PLUGINS}{os.pathsep}{inherited}" if inherited else str(VLLM_PLUGINS),
        "VLLM_SERVER_DEV_MODE": "1",  # the routes that pause, reload and tag weights
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB: over 20,000 tokens of the demonstration's model
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding would reserve a core and fight with the trainer
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


def serve_command(
    *,
    api: Address,
    inference: Address,
    model: str,
    seed: int,
    evaluations: Path | None = None,
    python: str = sys.executable,
) -> list[str]:
    """Return the command of the environment that samples from `inference` and sends rollouts to `api`.

    With a directory for `evaluations`, it first measures the held-out score of the untrained model.
    """
    command = [
        *(python, "-m", "local_stack.environment", "serve"),
        *("--env.rollout_server_url", api.url),
        *("--env.seed", str(seed)),
        *_sampling(inference, model),
    ]
    if evaluations is not None:
        command += ["--env.evaluate_before_training", "true", _EVALUATIONS, str(evaluations)]
    return command


def evaluate_command(
    *, inference: Address, model: str, evaluations: Path, python: str = sys.executable
) -> list[str]:
    """Return the command that measures the held-out score once and writes it into `evaluations`."""
    return [
        *(python, "-m", "local_stack.environment", "evaluate"),
        *_sampling(inference, model),
        *(_EVALUATIONS, str(evaluations)),
    ]


def train_command(
    *,
    config: Path,
    api: Address,
    inference: Address,
    model: str,
    steps: int,
    seed: int,
    output_dir: Path,
    page: Address | None = None,
    python: str = sys.executable,
) -> list[str]:
    """Return the command of the trainer: `atropos-train run` with this stack's addresses.

    `page` is where it serves the page of the run. None: where its own settings say.
    """
    return [
        *(python, "-m", "trainer.cli", "run"),
        *("--config", str(config)),
        *("--model.path", model),
        *("--atropos.url", api.url),
        *("--publish.servers", inference.url),
        *("--train.steps", str(steps)),
        *("--train.seed", str(seed)),
        *("--train.output_dir", str(output_dir)),
        *(() if page is None else ("--health.port", str(page.port))),
    ]


def prepare_model_command(
    name: str, *, link: Path, cache_dir: Path | None = None, python: str = sys.executable
) -> list[str]:
    """Return the command that makes the model `name` ready and points `link` at its directory."""
    cache = () if cache_dir is None else ("--cache-dir", str(cache_dir))
    return [python, "-m", "local_stack.prepare_model", name, "--link", str(link), *cache]


def _sampling(inference: Address, model: str) -> tuple[str, ...]:
    return (
        *("--env.tokenizer_name", model),
        *("--openai.base_url", f"{inference.url}/v1"),
        *("--openai.model_name", SERVED_MODEL_NAME),
        *("--openai.tokenizer_name", model),
        *("--openai.server_type", "vllm"),
    )

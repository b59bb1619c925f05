"""Runs of verl as a user starts them: the real Atropos API, an inference server, and two Ray workers."""

from __future__ import annotations

import contextlib
import json
import random
import secrets
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

from atropos_client.journal import Journal, LedgerEntry
from local_stack.commands import api_command, free_addresses, inference_command
from local_stack.health import answers
from local_stack.processes import ChildProcess
from tests.compose import ROOT
from tests.trainer.batches import make_group
from tests.verl.numbers import FLOAT32, LEARNING_RATE

BATCH_SIZE = 12
GROUP_SIZE = 4
DEADLINE = 240.0
"""Seconds for anything to happen, on a slow machine that is busy with other things."""
_PYTHON = str(ROOT / ".venv" / "bin" / "python")
"""Atropos's own packages are not in verl's environment."""
_PROJECT = "runs"
_ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "VERL_USE_EXTERNAL_MODULES": "tests.verl.cpu_platform",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),  # `ray start` makes none
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
}


class Stack:
    """An Atropos API, an inference server, and an environment that sends groups as they are wanted."""

    def __init__(self, model: Path, directory: Path, *, seed: int = 0) -> None:
        self.model = model
        self.directory = directory
        self.api, self.inference, self.ray, *self._agents = free_addresses(7)
        self.environment = {**_ENVIRONMENT, "VERL_FILE_LOGGER_ROOT": str(directory / "metrics")}
        """For Ray and for what runs in it: verl's metrics are written by a worker."""
        self._children: list[ChildProcess] = []
        self._random = random.Random(seed)
        self._ended = threading.Event()
        self._environment = threading.Thread(target=self._send, name="environment", daemon=True)

    def __enter__(self) -> Stack:
        self._start("api", api_command(self.api, python=_PYTHON), f"{self.api.url}/status")
        command = inference_command(self.inference, model=str(self.model), seed=0, python=_PYTHON)
        self._start("inference", command, f"{self.inference.url}/health")
        ray = ChildProcess(
            "ray",
            self._ray_command(),
            log_path=self.directory / "logs" / "ray.log",
            environment=self.environment,
            has_children=True,
        )
        self._children.append(ray)
        wait(lambda: "Ray runtime started" in ray.log_tail(60), "start Ray", ray)
        self._environment.start()
        return self

    def _ray_command(self) -> list[str]:
        """A cluster of one node. Its agents get ports: it gives up agents that are slow to find some."""
        agents = ("dashboard-agent-grpc", "dashboard-agent-listen", "metrics-export", "runtime-env-agent")
        ports = (f"--{name}-port={address.port}" for name, address in zip(agents, self._agents, strict=True))
        return [
            *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"),
            *(f"--port={self.ray.port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false"),
            *("--num-cpus=12", "--num-gpus=2", *ports),
        ]

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._environment.join()
        for child in self._children:
            child.kill()

    def _start(self, name: str, command: list[str], url: str) -> None:
        log = self.directory / "logs" / f"{name}.log"
        child = ChildProcess(name, command, log_path=log, environment={"HF_HUB_OFFLINE": "1"})
        self._children.append(child)
        wait(lambda: answers(url) or child.returncode is not None, f"start {name}")
        child.require_healthy()

    def _send(self) -> None:
        """Register when there is a trainer, and keep a batch in the queue."""
        body = {"max_token_length": 4096, "desired_name": "words", "weight": 1.0, "group_size": GROUP_SIZE}
        env_id = None
        while not self._ended.wait(0.5):
            with contextlib.suppress(httpx.HTTPError):
                if env_id is None:
                    reply = httpx.post(f"{self.api.url}/register-env", json=body, timeout=10).json()
                    env_id = reply["env_id"] if reply["status"] == "success" else None
                    continue
                queued = httpx.get(f"{self.api.url}/status", timeout=10).json()["queue_size"]
                if queued < BATCH_SIZE // GROUP_SIZE:
                    group = make_group(self._random, size=GROUP_SIZE, env_id=env_id)
                    httpx.post(f"{self.api.url}/scored_data", json=group, timeout=10).raise_for_status()


class VerlRun:
    """One start of `python -m verl_integration.main`."""

    def __init__(
        self, stack: Stack, output: Path, *, steps: int, words: Sequence[str] = (), **section: Any
    ) -> None:
        self.output = output
        output.mkdir(exist_ok=True)
        name = f"start-{len(list(output.glob('start-*.yaml')))}"
        self.metrics_path = stack.directory / "metrics" / _PROJECT / f"{name}.jsonl"
        config = output / f"{name}.yaml"
        config.write_text(yaml.safe_dump(_config(stack, output, steps, section, name)))
        self.process = ChildProcess(
            "verl",
            [sys.executable, "-m", "verl_integration.main", str(config), *words],
            log_path=output / "verl.log",  # a further start appends
            environment=stack.environment,
            may_finish=True,
            has_children=True,
        )

    def finish(self) -> None:
        """Wait until it has done its steps."""
        wait(lambda: self.process.returncode is not None, "finish", self.process)
        assert self.process.returncode == 0, self.process.log_tail(60)

    def steps(self) -> list[dict[str, Any]]:
        """The metrics of each step that verl logged in this start."""
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_text().splitlines(keepends=True)
        return [json.loads(line)["data"] for line in lines if line.endswith("\n")]


def ledger(output: Path) -> list[LedgerEntry]:
    journal = Journal.read_only(output / "journal")
    try:
        return list(journal.ledger())
    finally:
        journal.close()


def trained_bodies(output: Path) -> list[bytes]:
    """The bodies of the batches that were trained on, in the order of their steps."""
    trained = sorted((e for e in ledger(output) if e.outcome == "trained"), key=lambda entry: entry.step or 0)
    journal = Journal.read_only(output / "journal")
    try:
        return [journal.read(entry.number).body for entry in trained]
    finally:
        journal.close()


def wait(condition: Callable[[], bool], what: str, process: ChildProcess | None = None) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        said = process.log_tail(60) if process is not None else ""
        assert process is None or process.returncode in (None, 0), f"it ended and did not {what}:\n{said}"
        assert time.monotonic() < deadline, f"it did not {what}:\n{said}"
        time.sleep(0.5)


def _config(stack: Stack, output: Path, steps: int, section: dict[str, Any], name: str) -> dict[str, Any]:
    return {
        "actor_rollout_ref": {
            "model": {
                "path": str(stack.model),
                "enable_gradient_checkpointing": False,
                "use_remove_padding": False,
                "override_config": {"attn_implementation": "sdpa"},
            },
            "actor": {
                "strategy": "fsdp2",
                "ppo_max_token_len_per_gpu": 64,
                "use_torch_compile": False,
                "fsdp_config": {"mixed_precision": FLOAT32, "use_torch_compile": False},
                "optim": {"lr": LEARNING_RATE, "betas": [0.9, 0.95], "weight_decay": 0.0, "clip_grad": 1.0},
            },
        },
        "trainer": {
            "device": "cpu",
            "nnodes": 1,
            "n_gpus_per_node": 2,
            "total_training_steps": steps,
            "save_freq": 2,
            "default_local_dir": str(output),
            "logger": ["console", "file"],
            "project_name": _PROJECT,
            "experiment_name": name,
        },
        "transfer_queue": {"backend": {"SimpleStorage": {"num_data_storage_units": 1}}},
        "ray_kwargs": {"ray_init": {"address": f"127.0.0.1:{stack.ray.port}"}},
        "atropos": {
            "url": stack.api.url,
            "batch_size": BATCH_SIZE,
            "journal": {"prune": False},
            "publish": {"transport": "disk", "servers": [stack.inference.url], "dtype": "float32"},
            **section,
        },
    }

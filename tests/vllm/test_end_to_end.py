"""Whole runs on stock vLLM: real Atropos API, real environment, the trainer as a process of its own.

The model is tiny and random; everything else is what a user has. Served log-probs are read beside the run, by
the route that environments sample from.
"""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from local_stack.commands import Address, api_command, free_addresses, serve_command, train_command
from local_stack.health import answers
from local_stack.processes import ChildProcess
from tests.compose import ROOT
from tests.trainer.runs import rows
from tests.trainer.test_multiprocess import run_in_processes
from tests.vllm.conftest import StartVllm
from tests.vllm.launching import VllmServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 5
PROMPT = list(range(70, 102))
DEMO_CONFIG = ROOT / "local_stack" / "demo.yaml"
DEADLINE = 400.0
"""Seconds for anything to happen, on a slow machine that is busy with other things."""
FLAGS = (
    *("--max-num-seqs", "128", "--block-size", "32"),
    *("--worker-cls", "atropos_cpu_worker.AtroposCPUWorker"),
)
SETTINGS = (
    *("--optimizer.learning_rate", "1e-3", "--optimizer.warmup_steps", "0"),
    *("--publish.watch_interval", "0.5", "--publish.retry_seconds", "300"),
)


class Run:
    """An Atropos API, the demonstration's environment and a trainer around a vLLM server that runs."""

    def __init__(self, server: VllmServer, directory: Path, *settings: str, reply_tokens: int = 16) -> None:
        self.directory = directory
        (api,) = free_addresses(1)
        inference = Address(port=server.port)
        model = str(server.model)
        self._children: list[ChildProcess] = []
        self._start("api", api_command(api))
        environment = serve_command(api=api, inference=inference, model=model, seed=0)
        self._start("environment", [*environment, "--env.max_new_tokens", str(reply_tokens)])
        command = train_command(
            config=DEMO_CONFIG,
            api=api,
            inference=inference,
            model=model,
            steps=STEPS,
            seed=0,
            output_dir=directory,
        )
        self.trainer = self._start("trainer", [*command, *SETTINGS, *settings], stop_signal=signal.SIGINT)
        self.wait(lambda: answers(f"{api.url}/status"), "start the API")

    def _start(self, name: str, command: list[str], **settings: Any) -> ChildProcess:
        child = ChildProcess(
            name,
            command,
            log_path=self.directory / "logs" / f"{name}.log",
            environment={"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"},
            may_finish=name == "trainer",
            **settings,
        )
        self._children.append(child)
        return child

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl` so far."""
        path = self.directory / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [row for row in rows if row["kind"] == kind]

    def wait(self, condition: Callable[[], bool], what: str, *, every: float = 0.1) -> None:
        """Wait while everything is well; `every` is the pause between two looks, in seconds."""
        deadline = time.monotonic() + DEADLINE
        while not condition():
            self.require_all_healthy()
            assert time.monotonic() < deadline, f"it did not {what}:\n{self.trainer.log_tail(40)}"
            time.sleep(every)

    def finish(self) -> None:
        """Wait until the trainer has done its steps."""
        self.wait(lambda: self.trainer.returncode == 0, "finish")

    def require_all_healthy(self) -> None:
        """Raise if a process has ended that should run."""
        for child in self._children:
            child.require_healthy()

    def is_settled(self) -> bool:
        """Whether the newest step's version has been published."""
        steps, publishes = self.rows("step"), self.rows("publish")
        return bool(steps and publishes) and steps[-1]["step"] == publishes[-1]["version"]

    def log(self) -> str:
        """What the trainer has logged, on one line: its lines are wrapped for a terminal."""
        return " ".join(self.trainer.log_path.read_text(errors="replace").split())

    def kill_all(self) -> None:
        """End everything but the server."""
        for child in self._children:
            child.kill()


class Observer:
    """Reads beside a run what the server says of one text, by version."""

    def __init__(self, server: VllmServer) -> None:
        self.seen: dict[str, list[list[float]]] = {}
        self._server = server
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="observer")
        self._thread.start()

    def end(self) -> None:
        """Stop reading."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        with self._server.client(timeout=30.0) as client:
            while not self._ended.wait(0.1):
                try:
                    reply = served_logprobs(client)
                except (httpx.HTTPError, KeyError):  # it is down, or was killed while it answered
                    continue
                if reply is not None:
                    version, logprobs = reply
                    self.seen.setdefault(version, []).append(logprobs)


def served_logprobs(client: httpx.Client) -> tuple[str, list[float]] | None:
    """The version, and the log-probs of PROMPT as environments get them; None if a publish came between."""
    request = {
        "prompt": {"prompt_token_ids": PROMPT},
        "max_tokens": 1,
        "temperature": 1.0,
        "logprobs": 0,
        "prompt_logprobs": 0,
    }
    before = client.get("/weight_info").raise_for_status().json()["weight_version"]
    reply = client.post("/generate", json=request).raise_for_status().json()
    after = client.get("/weight_info").raise_for_status().json()["weight_version"]
    if before != after:
        return None
    entries = reply["prompt_logprobs"][1:]
    return before, [entry[str(token)] for entry, token in zip(entries, PROMPT[1:], strict=True)]


def own_logprobs(model_directory: Path) -> list[float]:
    """The same from the weights in a directory."""
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, :-1]
    scores: list[float] = torch.log_softmax(logits, -1)[range(len(PROMPT) - 1), PROMPT[1:]].tolist()
    return scores


def largest_difference(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def server(start_vllm: StartVllm, vllm_model_directory: Path) -> VllmServer:
    return start_vllm(vllm_model_directory, lora=True, flags=FLAGS)


@pytest.fixture
def fresh_server(server: VllmServer) -> VllmServer:
    """The server with the weights it was started with."""
    open_directory(server, server.model)
    assert server.post("/update_weight_version", {"new_version": "default"}).status_code == 200
    return server


def open_directory(server: VllmServer, directory: Path) -> None:
    """Let the server itself load a model's weights, and serve them without an adapter."""
    reload = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
    assert server.post("/collective_rpc", reload).status_code == 200
    assert server.post("/atropos/adapter", {"name": None}).status_code == 200


@pytest.fixture
def start_run(fresh_server: VllmServer, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Start a run on the server, which serves the weights it was started with."""
    runs: list[Run] = []

    def start(*settings: str, reply_tokens: int = 16) -> Run:
        runs.append(Run(fresh_server, tmp_path / "run", *settings, reply_tokens=reply_tokens))
        return runs[-1]

    yield start
    for run in runs:
        run.kill_all()


@pytest.fixture
def observer(server: VllmServer, start_run: Callable[..., Run]) -> Iterator[Observer]:
    observer = Observer(server)
    yield observer
    observer.end()


def assert_every_batch_was_trained_once(run: Run) -> None:
    """A batch whose groups all have equal scores, as a random model may sample them, is skipped for that."""
    steps, skipped = run.rows("step"), run.rows("skipped")
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert sorted(row["batch"] for row in steps + skipped) == list(range(1, STEPS + len(skipped) + 1))
    assert all(row["sequences"] == 96 for row in steps)
    assert {row["reason"] for row in skipped} <= {"no advantage differs from 0"}


def assert_every_version_was_proven(run: Run) -> None:
    publishes = run.rows("publish")
    assert {row["version"] for row in publishes} == set(range(STEPS + 1))
    assert all(row["publish_verified"] is True for row in publishes)
    assert all(row["publish_mean_difference"] < 1e-3 for row in publishes)


def assert_served_logprobs_change_each_time(observer: Observer) -> None:
    assert set(observer.seen) - {"default"} >= {str(version) for version in range(STEPS + 1)}
    for version in range(1, STEPS + 1):
        before, after = observer.seen[str(version - 1)], observer.seen[str(version)]
        # The version is what the label says from its first moment to its last.
        assert all(largest_difference(after[0], each) < 1e-4 for each in after)
        assert largest_difference(before[0], after[0]) > 1e-3


@pytest.mark.parametrize("transport", ["disk", "lora"])
def test_five_steps(
    transport: str, server: VllmServer, start_run: Callable[..., Run], observer: Observer
) -> None:
    adapters = ("--publish.transport", "lora", "--model.lora.rank", "8") if transport == "lora" else ()
    run = start_run(*adapters)
    run.finish()
    observer.end()
    assert_every_batch_was_trained_once(run)
    assert_every_version_was_proven(run)
    assert_served_logprobs_change_each_time(observer)
    served = observer.seen[str(STEPS)][-1]
    assert largest_difference(served, own_logprobs(run.directory / "final")) < 1e-3
    if transport == "disk":
        assert largest_difference(served, own_logprobs(server.model)) > 1e-2
    else:  # generation never stood still for an adapter
        assert all(row["publish_pause_seconds"] == 0 for row in run.rows("publish"))


@pytest.mark.parametrize("transport", ["disk", "lora"])
def test_two_steps_with_weights_spread_over_two_processes(
    transport: str, fresh_server: VllmServer, tmp_path: Path, free_port: int
) -> None:
    options = ["--parallel.mode", "sharded", "--optimizer.learning_rate", "1e-2"]
    options += ["--publish.transport", transport, "--publish.servers", fresh_server.url]
    options += ["--model.lora.rank", "8"] if transport == "lora" else []
    run = tmp_path / "run"
    run_in_processes(2, fresh_server.model, run, *options, port=free_port, steps=2, launcher="torchrun")
    published = rows(run, "publish")
    assert [row["version"] for row in published] == [0, 1, 2]
    assert all(row["publish_verified"] is True for row in published)
    trained, base = own_logprobs(run / "final"), own_logprobs(fresh_server.model)
    assert largest_difference(trained, base) > 1e-2
    with fresh_server.client() as client:
        served = served_logprobs(client)
        open_directory(fresh_server, fresh_server.model)
        before = served_logprobs(client)
        open_directory(fresh_server, run / "checkpoints/step-000002/model")
        opened = served_logprobs(client)
    for reply, expected in ((served, trained), (before, base), (opened, trained)):
        assert reply is not None
        assert reply[0] == "2"
        assert largest_difference(reply[1], expected) < 1e-3


def test_vllm_killed_in_the_middle_of_a_publish(server: VllmServer, start_run: Callable[..., Run]) -> None:
    run = start_run()
    run.wait(lambda: len(run.rows("step")) >= 2, "train two steps")
    with server.client(timeout=60.0) as client:
        run.wait(lambda: bool(client.get("/is_paused").json()["is_paused"]), "pause the server", every=0.0)
    killed_after = len(run.rows("step"))
    server.kill()
    time.sleep(1.0)
    assert run.trainer.returncode is None
    server.start()
    assert_finished_as_if_nothing_had_happened(run, server)
    struck = [row for row in run.rows("publish") if row["publish_attempts"] > 1]
    assert [row["version"] for row in struck] in ([killed_after], [killed_after + 1])


def test_vllm_killed_in_the_middle_of_a_rollout(server: VllmServer, start_run: Callable[..., Run]) -> None:
    # Long replies: most of the time between two publishes is sampling. Not longer: the more random bytes, the
    # surer there is a number among them, and the fewer groups have a spread in their scores.
    run = start_run(reply_tokens=96)
    with server.client(timeout=60.0) as client:
        # Not while a publish is under way, which a slow machine may take long for: that is the test above.
        run.wait(lambda: run.is_settled() and is_generating(client), "sample", every=0.0)
    server.kill()
    assert len(run.rows("step")) < STEPS, "the server was killed too late to matter"
    server.start()
    assert_finished_as_if_nothing_had_happened(run, server)
    # By the look between publishes, or by the next publish where a step was just being trained.
    retried = any(row["publish_attempts"] > 1 for row in run.rows("publish"))
    assert retried or re.search(r"serves version \d+ again", run.log())


def is_generating(client: httpx.Client) -> bool:
    """Whether a version of the trainer's is served, is not paused, and groups are being sampled from it."""
    lines = client.get("/metrics").text.splitlines()
    running = sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))
    return running >= 8 and not client.get("/is_paused").json()["is_paused"]


def assert_finished_as_if_nothing_had_happened(run: Run, server: VllmServer) -> None:
    run.finish()
    assert_every_batch_was_trained_once(run)
    assert_every_version_was_proven(run)
    with server.client() as client:
        reply = served_logprobs(client)
    assert reply is not None
    assert reply[0] == str(STEPS)
    assert largest_difference(reply[1], own_logprobs(run.directory / "final")) < 1e-3

"""How long a publish to a real vLLM takes, against restarting vLLM on the new checkpoint.

    python -m benchmarks.publish --repeats 10 --restarts 3 --json publish.json

One stock vLLM serves a model while an environment-like load samples from it through `/generate`. The
trainer's own publisher brings really changed weights to it, again and again, and proves each time that they
are served. Then the way of the Atropos example trainer's `legacy` mode on the same machine: stop vLLM, save
the checkpoint, start vLLM on it, wait until it answers. (Its own server does not import with a current
vLLM, so both ways use the stock one.)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from rich.table import Table

from benchmarks._machine import describe, machine
from benchmarks.publish_delta import compare, draw, measure_large
from benchmarks.publish_delta import show as show_deltas
from local_stack.command import positive
from local_stack.commands import Address, free_addresses, vllm_command, vllm_environment
from local_stack.models import prepare_demo_model
from local_stack.processes import ChildProcess
from trainer.config import load_config
from trainer.publish import Publisher
from trainer.run.build import build_publisher
from trainer.run.train_state import prepare_run

START_TIMEOUT = 300.0
PHASES = {
    "capture_seconds": "training stands still (copy, score the probes)",
    "stage_seconds": "write the weights",
    "pause_seconds": "generation stands still (pause to resume)",
    "load_seconds": "  of it: vLLM loads",
    "verify_seconds": "prove it",
    "total_seconds": "whole publish, capture to proven",
}
LORA_RANK = 16
TRANSPORTS = ("disk", "lora", "delta,disk", "delta,disk,restart")


def main() -> None:
    """Measure the ways and print the ratios."""
    arguments = _parser().parse_args()
    model = arguments.model or prepare_demo_model()
    console = Console()
    if "delta" in arguments.transport.split(","):
        compare_deltas(console, model, arguments)
        return
    with tempfile.TemporaryDirectory(prefix="publish-benchmark-") as scratch:
        server = Server(model, Path(scratch), python=arguments.vllm_python, dtype=arguments.dtype)
        try:
            server.start(model)
            ours = measure_publishes(server, model, Path(scratch), arguments)
            peer = [restart_on_checkpoint(server, model, Path(scratch)) for _ in range(arguments.restarts)]
        finally:
            server.stop()
    result = {
        "machine": machine(),
        "transport": arguments.transport,
        "dtype": arguments.dtype,
        "under_load": not arguments.idle,
        "ours": ours,
        "restart": peer,
    }
    show(console, result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


class Server:
    """A stock vLLM with the middleware, on one port, started as often as needed."""

    def __init__(
        self, model: Path, directory: Path, *, python: Path, dtype: str, deltas: Path | None = None
    ) -> None:
        (self.address,) = free_addresses(1)
        self._command = {"model": str(model), "python": str(python.absolute()), "dtype": dtype}
        self._log = directory / "vllm.log"
        self._deltas = deltas  # where the workers' extension reads; None: without it
        self._child: ChildProcess | None = None

    @property
    def url(self) -> str:
        """Base URL."""
        return self.address.url

    def start(self, model: Path) -> None:
        """Start it on a model directory and wait for its first token."""
        self._command["model"] = str(model)
        listen: Address = self.address
        environment = vllm_environment() | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
        if self._deltas is None:
            command = vllm_command(listen, seed=0, lora_rank=LORA_RANK, **self._command)
        else:
            command = vllm_command(listen, seed=0, **self._command)
            command += ["--worker-extension-cls", "atropos_delta.AtroposDelta"]
            environment["ATROPOS_DELTA_SOURCE"] = str(self._deltas)
        self._child = ChildProcess("vLLM", command, log_path=self._log, environment=environment)
        deadline = time.monotonic() + START_TIMEOUT
        while not self._answers():
            self._child.require_healthy()
            if time.monotonic() > deadline:
                raise TimeoutError(f"vLLM did not answer in {START_TIMEOUT:.0f} s:\n{self._child.log_tail()}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Stop it as an operator does."""
        if self._child is not None:
            self._child.stop(30.0)
            self._child = None

    def generate(self, *, tokens: int, samples: int, seed: int) -> int:
        """Sample as an environment does; returns the HTTP status."""
        prompt = [(7 * seed + 13 * place) % 4000 + 100 for place in range(64)]
        body = {
            "prompt": {"prompt_token_ids": prompt},
            "n": samples,
            "max_tokens": tokens,
            "ignore_eos": True,
        }
        return httpx.post(f"{self.url}/generate", json=body, timeout=120).status_code

    def _answers(self) -> bool:
        try:
            return self.generate(tokens=1, samples=1, seed=0) == httpx.codes.OK
        except httpx.TransportError:
            return False


def compare_deltas(console: Console, model: Path, arguments: argparse.Namespace) -> None:
    """Measure deltas beside full versions and, where it is asked for, restarts."""
    large = measure_large(arguments.large)
    python = arguments.vllm_python
    with tempfile.TemporaryDirectory(prefix="publish-benchmark-") as scratch, contextlib.ExitStack() as stack:
        places = {name: Path(scratch) / name / "published" for name in ("delta", "disk")}
        servers = {}
        for name, place in places.items():
            place.mkdir(parents=True)
            deltas = place if name == "delta" else None
            servers[name] = Server(model, place.parent, python=python, dtype="bfloat16", deltas=deltas)
            stack.callback(servers[name].stop)
            servers[name].start(model)
        urls = {name: server.url for name, server in servers.items()}
        rows = compare(urls, model, places, arguments)
        servers["delta"].stop()
        restarts = arguments.restarts if "restart" in arguments.transport.split(",") else 0
        peer = [restart_on_checkpoint(servers["disk"], model, Path(scratch)) for _ in range(restarts)]
    show_deltas(console, rows, large)
    if peer:
        console.print(f"vLLM restarted on the checkpoint: no service for {statistics.median(peer):.1f} s")
    console.print(f"{describe(machine())}; {arguments.repeats} publishes of each kind at each rate")
    if arguments.picture:
        draw(rows, large, arguments.picture)
    if arguments.json:
        result = {"machine": machine(), "rows": rows, "large": large, "restart": peer}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure_publishes(
    server: Server, model: Path, scratch: Path, arguments: argparse.Namespace
) -> list[dict[str, float]]:
    """The reports' numbers, one publish each, the first (which warms everything up) left out."""
    lora = ("--model.lora.rank", "8") if arguments.transport == "lora" else ()
    config = load_config(
        None,
        [
            *("--model.path", str(model)),
            *("--train.output_dir", str(scratch / "run")),
            *("--train.device", arguments.device),
            *("--publish.transport", arguments.transport),
            *("--publish.servers", server.url),
            *("--publish.dtype", arguments.dtype),
            *("--publish.on_failure", "abort"),
            *lora,
        ],
        environment={},
    )
    prepared = prepare_run(config)
    publisher = build_publisher(config, prepared)
    assert publisher is not None
    load = contextlib.nullcontext() if arguments.idle else sampling_load(server)
    numbers = []
    with publisher, load:
        publisher.start(0)
        publisher.settle()
        for number in range(1, arguments.repeats + 2):
            change(prepared.policy.model, seed=number)
            numbers.append(publish(publisher, number))
    return numbers[1:]


def publish(publisher: Publisher, number: int) -> dict[str, float]:
    """One publish as the training loop makes it: begin, then (here at once) wait."""
    publisher.take_reports()
    publisher.begin(number)
    publisher.settle()
    (report,) = publisher.take_reports()
    return {name.removeprefix("publish/"): value for name, value in report.metrics().items()}


def change(model: torch.nn.Module, *, seed: int) -> None:
    """A step that moves log-probs visibly: a thousandth of each tensor's own spread."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                spread = max(float(parameter.std()) if parameter.numel() > 1 else 0.0, 1e-2)
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter += 1e-3 * spread * noise


@contextlib.contextmanager
def sampling_load(server: Server) -> Iterator[None]:
    """Groups of eight under way all the time, like an environment's."""
    ended = threading.Event()

    def sample() -> None:
        seed = 0
        while not ended.is_set():
            seed += 1
            server.generate(tokens=32, samples=8, seed=seed)

    thread = threading.Thread(target=sample, name="load")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def restart_on_checkpoint(server: Server, model: Path, scratch: Path) -> float:
    """Seconds without service: stop, save, start on what was saved, first token."""
    source = scratch / "checkpoint"
    started = time.monotonic()
    server.stop()
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(model, source)  # what saving costs at least
    server.start(source)
    return time.monotonic() - started


def show(console: Console, result: dict[str, Any]) -> None:
    """Print the table and the ratio."""
    load = "under load" if result["under_load"] else "idle"
    table = Table(title=f"publish by {result['transport']}, {result['dtype']}, {load}: seconds")
    for name in ("", "median", "least", "most"):
        table.add_column(name, justify="left" if not name else "right")
    for key, label in PHASES.items():
        _add(table, label, [row[key] for row in result["ours"]])
    if result["restart"]:
        _add(table, "vLLM restarted on the checkpoint: no service", result["restart"])
    console.print(table)
    if result["restart"]:
        restart = statistics.median(result["restart"])
        whole = statistics.median(row["total_seconds"] for row in result["ours"])
        still = statistics.median(row["pause_seconds"] for row in result["ours"])
        ratio = f"{restart / still:.0f} times as long" if still else "against no pause at all"
        console.print(f"A restart takes {restart / whole:.1f} times a whole publish; no service {ratio}.")
    console.print(
        f"{describe(result['machine'])}; {len(result['ours'])} publishes, {len(result['restart'])} restarts"
    )


def _add(table: Table, label: str, seconds: list[float]) -> None:
    table.add_row(
        label, *(f"{number:.2f}" for number in (statistics.median(seconds), min(seconds), max(seconds)))
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.publish", description=__doc__)
    parser.add_argument("--model", type=Path, help="model directory; the demonstration's by default")
    parser.add_argument("--transport", choices=TRANSPORTS, default="disk")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="of the trainer")
    parser.add_argument("--repeats", type=positive, default=10)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--idle", action="store_true", help="without an environment's load")
    parser.add_argument("--vllm-python", type=Path, default=Path(".venv-vllm/bin/python"))
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--picture", type=Path, help="with delta: also draw cost by learning rate")
    parser.add_argument("--large", type=int, default=3, help="with delta: repeats with 1.2 billion weights")
    return parser


if __name__ == "__main__":
    if "OMP_WAIT_POLICY" not in os.environ:
        # Trainer and server share the cores, and threads that spin while they wait take them from each other.
        # OpenMP reads this when it is loaded: too late for this process.
        command = [sys.executable, "-m", "benchmarks.publish", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "OMP_WAIT_POLICY": "passive"})  # noqa: S606
    main()

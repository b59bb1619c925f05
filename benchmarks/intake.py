"""Measures the way from a batch's bytes to packed tensors, and whether training waits for it.

    python -m benchmarks.intake --repeats 7 --json intake.json

One process, one batch of half a million tokens in the JSON shape of the Atropos API, the ways alternating:
ours is what the trainer runs (validation, advantages, packing), the peer is the Atropos example trainer
(`json.loads` and `pad_data_to_good_offset`, without any validation), and pydantic's bare parser is there for
scale. Twice: with sequences of unequal lengths, and of one length, where the peer pads nothing.

Then a short real run against a real Atropos API: the share of the step for which the trainer stands idle
between two steps when the next batch was there in time, and what preparing beside a step costs the step.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from example_trainer.data import pad_data_to_good_offset
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from atropos_client import AtroposClient
from local_stack.command import positive
from local_stack.commands import api_command, free_addresses
from local_stack.models import prepare_demo_model
from schemas import BatchReply, ScoredGroup
from trainer.config import DataSettings, LossSettings, load_config
from trainer.packing import pack
from trainer.run.build import build_trainer
from trainer.samples.advantages import AdvantageNormalizer
from trainer.samples.prepare import PreparedBatch, prepare_batch
from trainer.samples.validation import ModelLimits

VOCABULARY = 49_152
PROMPT = 400
SHORTEST, LONGEST = 200, 1000  # completions; their mean is the length of the equal ones
PEER_BATCH = 64
START_TIMEOUT = 60.0


def main() -> None:
    """Measure, print the tables, write the numbers."""
    arguments = _parser().parse_args()
    console = Console()
    result: dict[str, Any] = {"machine": machine(), "intake": {}}
    for name in ("unequal", "equal"):
        body = make_body(arguments.groups, arguments.size, equal=name == "equal")
        result["intake"][name] = measure_intake(body, arguments)
        show_intake(console, name, result["intake"][name])
    result["beside_a_step"] = measure_beside(make_body(arguments.groups, arguments.size), arguments.repeats)
    show_beside(console, result["beside_a_step"])
    if not arguments.without_run:
        result["run"] = measure_run(arguments.model or prepare_demo_model(), steps=arguments.steps)
        show_run(console, result["run"])
    console.print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def make_group(
    generator: random.Random, *, size: int, lengths: Callable[[], int], prompt: int, vocabulary: int
) -> dict[str, Any]:
    """One group as the API serves it: every key of its `ScoredData`, log-probs with all their digits."""
    start = [generator.randrange(vocabulary) for _ in range(prompt)]
    completions = [[generator.randrange(vocabulary) for _ in range(lengths())] for _ in range(size)]
    return {
        "tokens": [start + completion for completion in completions],
        "masks": [[-100] * prompt + completion for completion in completions],
        "scores": [float(index % 2) for index in range(size)],
        "advantages": None,
        "ref_logprobs": None,
        "messages": None,
        "generation_params": {"temperature": 1.0},
        "inference_logprobs": [
            # Servers compute in float32: its digits, written as a double.
            [1.0] * prompt + torch.empty(len(completion)).uniform_(-3, 0).tolist()
            for completion in completions
        ],
        "overrides": None,
        "group_overrides": None,
        "images": None,
        "env_id": 0,
        "distill_token_ids": None,
        "distill_logprobs": None,
    }


def make_body(groups: int, size: int, *, equal: bool = False) -> bytes:
    """A body of `GET /batch`."""
    generator = random.Random(0)
    torch.manual_seed(0)
    mean = (SHORTEST + LONGEST) // 2

    def length() -> int:
        return mean if equal else generator.randint(SHORTEST, LONGEST)

    batch = [
        make_group(generator, size=size, lengths=length, prompt=PROMPT, vocabulary=VOCABULARY)
        for _ in range(groups)
    ]
    return json.dumps({"batch": batch}, separators=(",", ":")).encode()


def prepare(reply: BatchReply) -> PreparedBatch:
    """The trainer's tensors of a reply."""
    data = DataSettings()
    return prepare_batch(
        reply,
        limits=ModelLimits(vocabulary_size=VOCABULARY, max_sequence_length=4096),
        data=data,
        loss=LossSettings(),
        normalizer=AdvantageNormalizer(data.advantage_normalization),
    )


def measure_intake(body: bytes, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every way, by stage, the ways alternating."""
    bare: TypeAdapter[Any] = TypeAdapter(dict[str, Any])
    seconds: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        value = call()
        seconds.setdefault(name, []).append(time.perf_counter() - started)
        return value

    tokens = 0
    for _ in range(arguments.repeats + 1):  # the first round warms up
        reply = timed("parse", lambda: BatchReply.model_validate_json(body))
        batch = timed("prepare", lambda reply=reply: prepare(reply))
        timed(
            "pack",
            lambda batch=batch: pack(
                batch.samples,
                batch.denominators,
                packing="prefix_tree",
                tokens_per_micro_batch=arguments.tokens_per_micro_batch,
            ),
        )
        tokens = sum(group.token_count for group in reply.groups)
        del reply, batch
        parsed = timed("peer_parse", lambda: json.loads(body))
        timed("peer_pad", lambda parsed=parsed: pad_data_to_good_offset(parsed, PEER_BATCH))
        del parsed
        timed("bare_pydantic", lambda: bare.validate_json(body))
    kept = {name: values[1:] for name, values in seconds.items()}
    unpacked = [a + b for a, b in zip(kept["parse"], kept["prepare"], strict=True)]
    ours = [a + b for a, b in zip(unpacked, kept["pack"], strict=True)]
    peer = [a + b for a, b in zip(kept["peer_parse"], kept["peer_pad"], strict=True)]
    median = {name: statistics.median(values) for name, values in kept.items()}
    median |= {
        "ours": statistics.median(ours),
        "ours_without_packing": statistics.median(unpacked),
        "peer": statistics.median(peer),
    }
    return {
        "bytes": len(body),
        "tokens": tokens,
        "median_seconds": median,
        "ratio": median["peer"] / median["ours"],
        "ratio_without_packing": median["peer"] / median["ours_without_packing"],
    }


def measure_beside(body: bytes, repeats: int) -> dict[str, float]:
    """Seconds of a block of matrix products alone, and while another thread parses and prepares.

    The products stand for a step: long calls into torch, between which the thread needs the interpreter.
    One torch thread each, so that two cores are enough for both.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    weights = torch.randn(256, 256)

    def step() -> float:
        started = time.perf_counter()
        for _ in range(2000):
            torch.mm(weights, weights)
        return time.perf_counter() - started

    def in_background() -> None:
        prepare(BatchReply.model_validate_json(body))

    step()
    alone, beside = [], []
    for _ in range(repeats):
        alone.append(step())
        thread = threading.Thread(target=in_background)
        thread.start()
        beside.append(step())
        thread.join()
    torch.set_num_threads(threads)
    return {
        "alone_seconds": statistics.median(alone),
        "beside_seconds": statistics.median(beside),
        "added_seconds": statistics.median(b - a for a, b in zip(alone, beside, strict=True)),
    }


def measure_run(model: Path, *, steps: int) -> dict[str, Any]:
    """A run against a real API that is given its batches before they are needed."""
    (address,) = free_addresses(1)
    server = subprocess.Popen(api_command(address))  # noqa: S603 - our own command
    rows: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory() as scratch:
            with AtroposClient(address.url) as client:
                client.wait_until_ready(START_TIMEOUT)
            feeder = threading.Thread(target=_feed, args=(address.url, steps), daemon=True)
            feeder.start()
            words = [
                *("--model.path", str(model), "--atropos.url", address.url, "--atropos.batch_size", "16"),
                *("--train.output_dir", scratch, "--train.steps", str(steps), "--train.device", "cpu"),
                *("--checkpoint.every", str(steps)),
            ]
            build_trainer(load_config(None, words, environment={}), on_row=rows.append).run()
            feeder.join(START_TIMEOUT)
    finally:
        server.terminate()
        server.wait()
    # The first step has nothing before it; the second batch may have come late.
    timed = [row for row in rows if row["kind"] == "step"][2:]
    return {
        "steps": len(timed),
        "training_seconds": statistics.median(row["training_seconds"] for row in timed),
        "idle_seconds": statistics.median(row["idle_seconds"] for row in timed),
        "idle_share": statistics.median(row["idle_seconds"] / row["training_seconds"] for row in timed),
        "preparing_seconds": statistics.median(row["preparing_seconds"] for row in timed),
        "prepared_ahead": sum(row["prepared_ahead"] for row in timed),
    }


def _feed(url: str, steps: int) -> None:
    """Register as an environment as soon as the trainer polls, and send all batches at once."""
    registration = {"max_token_length": 4096, "desired_name": "benchmark", "weight": 1.0, "group_size": 8}
    while True:
        reply = httpx.post(f"{url}/register-env", json=registration).raise_for_status().json()
        if reply["status"] == "success":
            break
        time.sleep(0.1)
    generator = random.Random(1)
    for _ in range(2 * steps):
        group = make_group(
            generator, size=8, lengths=lambda: generator.randint(16, 64), prompt=100, vocabulary=VOCABULARY
        )
        group = ScoredGroup.model_validate({**group, "env_id": reply["env_id"]}).model_dump(exclude_none=True)
        httpx.post(f"{url}/scored_data_list", json=[group]).raise_for_status()


def machine() -> dict[str, Any]:
    """The machine that the numbers were measured on."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": psutil.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pydantic": version("pydantic"),
        "atroposlib": version("atroposlib"),
        "date": datetime.now(UTC).date().isoformat(),
    }


def show_intake(console: Console, name: str, result: dict[str, Any]) -> None:
    """Print one table and its ratio."""
    title = f"{result['tokens']:,} tokens of {name} lengths, {result['bytes'] / 1e6:.1f} MB: milliseconds"
    table = Table("", "median", title=title)
    labels = {
        "parse": "ours: parse and validate",
        "prepare": "ours: advantages, samples",
        "pack": "ours: pack",
        "ours": "ours, all",
        "peer_parse": "peer: json.loads",
        "peer_pad": "peer: pad_data_to_good_offset",
        "peer": "peer, all",
        "bare_pydantic": "pydantic's bare validate_json",
    }
    for key, label in labels.items():
        table.add_row(label, f"{1000 * result['median_seconds'][key]:.0f}")
    console.print(table)
    console.print(
        f"The peer takes {result['ratio']:.2f} times as long; {result['ratio_without_packing']:.2f} times "
        "if ours did not pack."
    )


def show_beside(console: Console, result: dict[str, float]) -> None:
    """Print what a preparation costs the thread that trains."""
    console.print(
        f"A step of {result['alone_seconds']:.2f} s gets {1000 * result['added_seconds']:.0f} ms longer "
        "while another thread takes in one such batch."
    )


def show_run(console: Console, result: dict[str, Any]) -> None:
    """Print the idle share of a real run."""
    console.print(
        f"Real run, {result['steps']} steps of {result['training_seconds']:.2f} s: idle between two steps "
        f"{1000 * result['idle_seconds']:.1f} ms, {100 * result['idle_share']:.2f}% of the step; "
        f"{result['prepared_ahead']} of them prepared ahead, in {1000 * result['preparing_seconds']:.1f} ms."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.intake", description=__doc__)
    parser.add_argument("--repeats", type=positive, default=7)
    parser.add_argument("--groups", type=positive, default=64)
    parser.add_argument("--size", type=positive, default=8, help="sequences a group")
    parser.add_argument("--tokens-per-micro-batch", type=positive, default=8192)
    parser.add_argument("--model", type=Path, help="of the real run; the demonstration's by default")
    parser.add_argument("--steps", type=positive, default=8, help="of the real run")
    parser.add_argument("--without-run", action="store_true", help="measure intake alone")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    return parser


if __name__ == "__main__":
    main()

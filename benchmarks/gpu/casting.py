"""Measures a publish before anything is sent: casting the weights and cutting them into buckets.

    python -m benchmarks.gpu.casting --device cuda --model qwen3-0.6b-random

`stream`: weight by weight, as every transport reads them. `at once`: the whole model cast first, as peers do
that gather a state dict. Seconds, bytes cast a second, and the peak of memory above the model. The two take
turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks._machine import describe, machine
from benchmarks.step._memory import PeakMemory
from benchmarks.step._models import MODELS, resolve_model
from trainer.config import DataSettings, ModelSettings
from trainer.model.load import load_policy
from trainer.model.weight_stream import WeightStream

_REPEATS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure both ways and print a table."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory(prefix="casting-benchmark-") as scratch:
        path = resolve_model(options.model, Path(scratch))
        policy = load_policy(ModelSettings(path=str(path)), DataSettings())
        policy.model.to(device)
        stream = WeightStream(policy.model, policy.base, dtype=torch.bfloat16)
        ways: dict[str, Callable[[], None]] = {
            "stream, in buckets": lambda: _in_buckets(stream),
            "at once": lambda: _at_once(policy.model),
        }
        for way in ways.values():
            way()
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
        for _ in range(_REPEATS):
            for name, way in ways.items():
                results[name].append(_measure(way, device))
    about = machine(options.device)
    table = Table(
        "way", "seconds", "GB/s", "MiB above the model", title=f"{stream.total_bytes >> 20} MiB of bfloat16"
    )
    for name, rows in results.items():
        seconds = statistics.median(row["seconds"] for row in rows)
        above = max(row["bytes_above"] or 0 for row in rows)
        table.add_row(
            name, f"{seconds:.4f}", f"{stream.total_bytes / seconds / 1e9:.1f}", f"{above / 2**20:.1f}"
        )
    console = Console()
    console.print(table)
    console.print(describe(about), highlight=False)
    if options.json:
        record = {"benchmark": "casting", "machine": about, "bytes": stream.total_bytes, "results": results}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def _in_buckets(stream: WeightStream) -> None:
    """Cast weight by weight, and copy what belongs together into one buffer, as a transfer does."""
    waiting: list[torch.Tensor] = []
    held = 0
    for _, tensor in stream.weights():
        flat = tensor.view(-1).view(torch.uint8)
        if waiting and held + flat.numel() > stream.bucket_bytes:
            torch.cat(waiting)
            waiting, held = [], 0
        waiting.append(flat)
        held += flat.numel()
    torch.cat(waiting)


def _at_once(model: nn.Module) -> None:
    """Cast everything before anything is used."""
    state = {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.named_parameters()}
    del state


def _measure(way: Callable[[], None], device: torch.device) -> dict[str, Any]:
    peak = PeakMemory(device)
    peak.start()
    started = time.perf_counter()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "bytes_above": peak.stop().above_start}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.casting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--model", default="qwen3-0.6b-random", help=f"a directory, or {', '.join(MODELS)}")
    add("--json", type=Path, help="also write the numbers here")
    return parser


if __name__ == "__main__":
    sys.exit(main())

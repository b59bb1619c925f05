"""Measures the language-model head: log-probs of many tokens, forward and backward.

    python -m benchmarks.head --rows 1728 --vocabulary 49152 --hidden 576 --dtype bf16

Ours in tiles, against plain logits (`linear`, `log_softmax`, `gather`) and torch's chunked
`linear_cross_entropy`, on identical inputs, and against the time of the four matrix products that no way
without logits can avoid. Each way runs in a fresh process; its peak memory is the kernel's own count (on a
GPU the allocator's). "over the head" is that peak less what stood before (inputs, weight, libraries) and less
the gradient of the weight.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from local_stack.command import positive
from trainer.model.lm_head import tiled_scores

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
WAYS = {
    "ours": "in tiles",
    "logits": "plain logits",
    "torch": "torch, chunked",
    "products": "4 products only",
}


def main() -> None:
    """Measure every way in a process of its own and print a table."""
    arguments = _parser().parse_args()
    if arguments.way:
        print(json.dumps(_measure(arguments)))
        return
    results = {way: result for way in arguments.ways.split(",") if (result := _in_own_process(way))}
    Console().print(_table(arguments, results))
    if arguments.small_vocabulary and "ours" in results:
        small = _in_own_process("ours", "--vocabulary", str(arguments.small_vocabulary))
        if small:
            results["ours, small vocabulary"] = small
            Console().print(_memory_verdict(arguments, results["ours"], small))
    if arguments.json:
        settings = {
            name: getattr(arguments, name) for name in ("rows", "vocabulary", "hidden", "dtype", "device")
        }
        machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        report = {"settings": settings, "machine": machine, "torch": torch.__version__, "results": results}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _in_own_process(way: str, *overrides: str) -> dict[str, float] | None:
    """Measure one way with these arguments; None if that failed: plain logits may well not fit."""
    command = [sys.executable, "-m", "benchmarks.head", *sys.argv[1:], *overrides, "--way", way]
    reply = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - this program
    if reply.returncode != 0:
        sys.stderr.write(f"{way} failed ({reply.returncode}): {reply.stderr[-500:]}\n")
        return None
    result: dict[str, float] = json.loads(reply.stdout.splitlines()[-1])
    return result


def _memory_verdict(arguments: argparse.Namespace, large: dict[str, float], small: dict[str, float]) -> str:
    """Peak against that of a small vocabulary plus the head itself (weight and gradient)."""
    head = 2 * arguments.vocabulary * arguments.hidden * 4 / 2**20
    allowed = small["peak_mib"] + head
    return (
        f"peak {large['peak_mib']:.0f} MiB; with a vocabulary of {arguments.small_vocabulary} "
        f"{small['peak_mib']:.0f} MiB, plus weight and gradient of the head {head:.0f} MiB, makes "
        f"{allowed:.0f} MiB: {100 * (large['peak_mib'] / allowed - 1):+.1f}%"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head", description=__doc__)
    parser.add_argument(
        "--rows", type=positive, default=1728, help="trained tokens, each predicted from its own row"
    )
    parser.add_argument("--vocabulary", type=positive, default=49152)
    parser.add_argument("--hidden", type=positive, default=576)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="bf16: by autocast")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument(
        "--ways", default="ours,logits,torch,products", help="comma list of " + ", ".join(WAYS)
    )
    parser.add_argument(
        "--small-vocabulary", type=positive, help="compare our peak memory with that of this one"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--way", choices=sorted(WAYS), help=argparse.SUPPRESS)
    return parser


def _measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds (median) and peak memory (MiB) of one way, in this process."""
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    generator = torch.Generator().manual_seed(0)
    shape = arguments.rows, arguments.hidden
    hidden = torch.randn(shape, generator=generator).to(device).requires_grad_()
    weight = torch.randn(arguments.vocabulary, arguments.hidden, generator=generator).mul_(0.02)
    weight = weight.to(device).requires_grad_()
    targets = torch.randint(arguments.vocabulary, (arguments.rows,), generator=generator).to(device)
    slope = torch.randn(arguments.rows, generator=generator).to(device)  # stands for the loss's gradient
    # The matrix library sets up its threads and buffers before anything is counted.
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        tiled_scores(
            hidden[:64],
            weight[:256],
            None,
            targets[:64] * 0 + torch.arange(64).to(device),
            targets[:64] % 256,
        )

    def run() -> None:
        hidden.grad = weight.grad = None
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logprobs = _way(arguments.way, hidden, weight, targets)
        if logprobs is not None:
            (logprobs * slope).sum().backward()

    if arguments.way == "products":
        run = _products(hidden.detach().to(dtype), weight.detach().to(dtype))
    before = _memory(device, reset=True)
    seconds = [_timed(run, device)]
    peak = _memory(device)
    seconds += [_timed(run, device) for _ in range(arguments.repeats)]
    gradient = weight.numel() * 4 / 2**20
    return {
        "seconds": statistics.median(seconds[1:] or seconds),
        "peak_mib": peak,
        "before_mib": before,
        "over_the_head_mib": peak - before - gradient,
    }


def _way(way: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor | None:
    """Log-probs [N] by one of the ways."""
    if way == "ours":
        rows = torch.arange(len(hidden), device=hidden.device)
        return tiled_scores(hidden, weight, None, rows, targets).logprobs
    if way == "torch":
        options = torch.nn.LinearCrossEntropyOptions()
        dtype = torch.get_autocast_dtype(hidden.device.type) if _autocast(hidden) else hidden.dtype
        loss = functional.linear_cross_entropy(
            hidden.to(dtype), weight.to(dtype), targets, reduction="none", options=options
        )
        return -loss.float()
    logits = functional.linear(hidden, weight).float()
    return logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]


def _autocast(hidden: Tensor) -> bool:
    return torch.is_autocast_enabled(hidden.device.type)


def _products(hidden: Tensor, weight: Tensor) -> Callable[[], None]:
    """Forward, again in the backward pass, and both gradients: in slices, so that they fit anywhere."""
    slices = [slice(start, start + 4096) for start in range(0, len(weight), 4096)]
    logits = [hidden @ weight[:4096].t()]

    def run() -> None:
        for part in slices:
            block = weight[part]
            tile = logits[0][:, : len(block)]
            hidden @ block.t()
            hidden @ block.t()
            tile @ block
            tile.t() @ hidden

    return run


def _timed(run: Callable[[], None], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(device: torch.device, *, reset: bool = False) -> float:
    """Peak memory since the last reset, in MiB; with `reset`, what is in use from here on."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**10


def _table(arguments: argparse.Namespace, results: dict[str, Any]) -> Table:
    table = Table(
        title=f"{arguments.rows} tokens, vocabulary {arguments.vocabulary}, hidden {arguments.hidden}, "
        f"{arguments.dtype}, {arguments.device}"
    )
    for name in ("way", "seconds", "of the 4 products", "peak MiB", "over the head MiB"):
        table.add_column(name, justify="left" if name == "way" else "right")
    floor = results.get("products", {}).get("seconds")
    for way, result in results.items():
        memory = (
            ["", ""]
            if way == "products"
            else [f"{result['peak_mib']:.0f}", f"{result['over_the_head_mib']:.0f}"]
        )
        ratio = f"{result['seconds'] / floor:.2f}" if floor else ""
        table.add_row(WAYS.get(way, way), f"{result['seconds']:.3f}", ratio, *memory)
    return table


if __name__ == "__main__":
    main()

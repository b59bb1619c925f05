"""Alternating measurements of several contenders on one batch."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.step._cases import Case
from benchmarks.step._contender import Contender
from benchmarks.step._memory import PeakMemory

__all__ = ["measure", "relative_difference"]

Row = dict[str, Any]
"""One contender's numbers, JSON-able; see `measure`."""


def measure(
    contenders: Sequence[Contender],
    case: Case,
    *,
    repeats: int,
    truth: dict[str, Tensor] | None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Warm each contender up once, then let all take turns `repeats` times.

    The warm-up is a whole step, and its peak memory counts. Its gradients are compared with `truth`, by
    parameter name (None: with nothing): a fast wrong step cannot win unnoticed.

    Returns:
        One row a contender, in their order: name, label, status (`ok` or what went wrong), seconds (each
        repeat's), others_share (each repeat's: what part of all cores other processes took meanwhile; above a
        few hundredths the seconds say little), prepare_seconds, computed_tokens, loss, peak_bytes and
        peak_total_bytes (the warm-up's, one value; None where unknown), gradient_difference (to
        `truth`; None where there is nothing to compare).
    """
    rows = {contender.name: empty_row(contender.name, contender.label, "ok") for contender in contenders}
    able = []
    for contender in contenders:
        row = rows[contender.name]
        progress(f"{case.name}: warm-up, {contender.label}")
        try:
            _warm_up(contender, case, row)
        except torch.OutOfMemoryError:
            row["status"] = "out of memory"
            contender.forget()
            continue
        able.append(contender)
        if contender.makes_gradients and truth is not None:
            row["gradient_difference"] = relative_difference(contender.gradients(), truth)
        contender.forget()
    for number in range(1, repeats + 1):
        for contender in contenders:
            if contender in able:
                progress(f"{case.name}: {number} of {repeats}, {contender.label}")
                _timed_step(contender, rows[contender.name])
    return [rows[contender.name] for contender in contenders]


def relative_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Euclidean norm of the difference of two sets of gradients, over that of `expected`.

    Raises:
        ValueError: They are not of the same parameters.
    """
    if found.keys() != expected.keys():
        odd = sorted(found.keys() ^ expected.keys())
        raise ValueError(f"gradients of different parameters: {', '.join(odd[:5])}")
    difference = sum(float((found[name] - expected[name]).double().square().sum()) for name in expected)
    norm = sum(float(gradient.double().square().sum()) for gradient in expected.values())
    return float((difference / norm) ** 0.5)


def empty_row(name: str, label: str, status: str) -> Row:
    """A contender of which nothing is measured yet, or never will be: `status` is "ok", or says why."""
    return {
        "name": name,
        "label": label,
        "status": status,
        "seconds": [],
        "others_share": [],
        "prepare_seconds": None,
        "computed_tokens": None,
        "loss": None,
        "peak_bytes": [],
        "peak_total_bytes": [],
        "gradient_difference": None,
    }


def _warm_up(contender: Contender, case: Case, row: Row) -> None:
    started = time.perf_counter()
    contender.prepare(case)
    row["prepare_seconds"] = time.perf_counter() - started
    # Not around the timed steps: giving all free memory back before each would have every step fault in anew
    # what a training loop keeps from step to step.
    memory = PeakMemory(contender.setting.device)
    memory.start()
    row["loss"] = contender.step()
    peak = memory.stop()
    row["peak_bytes"].append(peak.above_start)
    row["peak_total_bytes"].append(peak.total)
    row["computed_tokens"] = contender.computed_tokens


def _timed_step(contender: Contender, row: Row) -> None:
    device = contender.setting.device
    _synchronize(device)
    busy, own, started = _busy_seconds(), time.process_time(), time.perf_counter()
    contender.step()
    _synchronize(device)
    seconds = time.perf_counter() - started
    others = _busy_seconds() - busy - (time.process_time() - own)
    row["seconds"].append(seconds)
    row["others_share"].append(max(0.0, others) / (seconds * (psutil.cpu_count() or 1)))
    contender.forget()
    gc.collect()


def _busy_seconds() -> float:
    """CPU seconds that all processes of this machine, and its host, have taken so far."""
    times = psutil.cpu_times()
    # What a guest runs is counted in `user` already.
    return float(
        sum(times) - times.idle - sum(getattr(times, n, 0) for n in ("iowait", "guest", "guest_nice"))
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()

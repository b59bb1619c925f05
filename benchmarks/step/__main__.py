r"""One training step, ours and others', on the same batches: seconds, tokens, memory, and the floor below.

    python -m benchmarks.step --cases a,b,c,d --dtype float32,bfloat16 --json step.json

All contenders of a case run in this process and take turns (A B C A B C ...), after one whole step each to
warm up. Optimizer, publishing and fetching the batch are not part of the step; validating, padding and the
like are done before the clock starts. What exactly each contender calls: the docstrings of `_ours`,
`_padding`, `_example_trainer` and `_trl` in this directory. What the columns mean: docs/performance.md.

On an accelerator, full fine-tuning with AdamW, to compare with published throughput:

    python -m benchmarks.step --device cuda --model qwen3-0.6b-random --cases throughput --dtype bfloat16 \\
        --micro-batch-tokens 16384 --activation-recomputation --optimizer-step
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from rich.console import Console

from benchmarks._machine import describe, machine, package_version
from benchmarks.step._cases import SHAPES, make_case
from benchmarks.step._contender import Contender, Setting, UnavailableError, autocast
from benchmarks.step._example_trainer import ExampleTrainer, load_example_model
from benchmarks.step._measure import empty_row, measure
from benchmarks.step._models import MODELS, resolve_model
from benchmarks.step._ours import Floor, FloorWithoutHead, Ours, Recomputing
from benchmarks.step._padding import PlainPadding, float32_gradients
from benchmarks.step._table import show
from benchmarks.step._trl import Trl
from benchmarks.step._work import arithmetic_of, peak_flops_of
from local_stack.command import positive

PEERS = ("padding", "example-trainer", "example-trainer-stored", "trl")
CONTENDERS = ("floor", "floor-body", "ours", "recomputing", *PEERS)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and return what `--json` writes."""
    options = _parser().parse_args(arguments)
    if options.optimizer_step:
        # The others' way ends with their gradients; against a whole step they would look too fast.
        options.contenders = ["ours"]
    console = Console(width=max(Console().width, 150))
    log = Console(stderr=True)
    result: dict[str, Any] = {
        "benchmark": "step",
        "machine": machine(options.device),
        "versions": {name: package_version(name) for name in ("accelerate", "atroposlib", "trl")},
        "command": ["python", "-m", "benchmarks.step", *(sys.argv[1:] if arguments is None else arguments)],
        "threads": torch.get_num_threads(),
        "runs": [],
    }
    with tempfile.TemporaryDirectory(prefix="step-benchmark-") as scratch:
        model = resolve_model(options.model, Path(scratch))
        for dtype in options.dtype:
            for run in _runs(options, dtype, model, Path(scratch) / dtype, log.print):
                result["runs"].append(run)
                show(console, run)
                if options.json:
                    options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            gc.collect()  # the models of one dtype, before those of the next
    console.print(describe(result["machine"]))
    return result


def _runs(
    options: argparse.Namespace, dtype: str, model: Path, scratch: Path, log: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Measure every case in one dtype."""
    setting = Setting(
        model=model,
        dtype=getattr(torch, dtype),
        device=torch.device(options.device),
        micro_batch_tokens=options.micro_batch_tokens,
        activation_recomputation=options.activation_recomputation,
        optimizer_step=options.optimizer_step,
        scratch=scratch,
    )
    contenders, absent = make_contenders(setting, options.contenders, options.ours_packing)
    base = next(contender for contender in contenders if isinstance(contender, Ours))
    arithmetic = arithmetic_of(base.prepared.policy.model)
    peak = options.peak_tflops * 1e12 if options.peak_tflops else _device_peak(options.device)
    for name in options.cases:
        case = make_case(
            name,
            vocabulary=base.prepared.policy.limits.vocabulary_size,
            score=lambda tokens: score(base, tokens),
            seed=options.seed,
        )
        truth = None
        if not setting.optimizer_step:
            log(f"{name}: the gradients in float32, which all others are compared with")
            truth = float32_gradients(setting, case)
        rows = measure(contenders, case, repeats=options.repeats, truth=truth, progress=log)
        yield {
            "case": name,
            "title": case.title,
            "dtype": dtype,
            "model": options.model,
            "device": options.device,
            "micro_batch_tokens": options.micro_batch_tokens,
            "activation_recomputation": options.activation_recomputation,
            "optimizer_step": options.optimizer_step,
            "counts": case.counts,
            "step_flop": arithmetic.step(case.counts),
            "peak_flops": peak,
            "contenders": [*rows, *absent],
        }


def make_contenders(
    setting: Setting, names: Sequence[str], packings: Sequence[str]
) -> tuple[list[Contender], list[dict[str, Any]]]:
    """Load those that are asked for.

    Returns:
        The contenders (our own first among those that train), and a row for each that is not available.
    """
    # Accelerate fixes the mixed precision once a process; a benchmark of two goes on to another.
    AcceleratorState._reset_state(reset_partial_state=True)
    absent: list[dict[str, Any]] = []
    ours: list[Ours] = []
    for packing in packings:
        try:
            ours.append(Ours(setting, packing))
        except UnavailableError as error:
            absent.append(empty_row(f"ours-{packing}", f"ours, packing {packing}", str(error)))
    if not ours:
        raise SystemExit(f"ours is not available: {absent[0]['status']}")
    shared = ours[0].model
    contenders: list[Contender] = []
    if "floor" in names:
        contenders.append(Floor(setting, shared))
    if "floor-body" in names:
        contenders.append(FloorWithoutHead(setting, shared))
    contenders += ours
    if "recomputing" in names and not setting.activation_recomputation:
        contenders.append(Recomputing(setting))
    if "padding" in names:
        contenders.append(PlainPadding(setting, shared))
    for load in (_load_example_trainer, _load_trl):
        try:
            contenders += load(setting, names)
        except UnavailableError as error:
            label = "TRL's GRPO loss" if load is _load_trl else "Atropos example trainer"
            absent.append(empty_row("trl" if load is _load_trl else "example-trainer", label, str(error)))
    return contenders, absent


def _load_example_trainer(setting: Setting, names: Sequence[str]) -> list[Contender]:
    wanted = {"example-trainer": True, "example-trainer-stored": False}
    if not wanted.keys() & set(names):
        return []
    model = load_example_model(setting)
    return [
        ExampleTrainer(setting, model, recompute=recompute)
        for name, recompute in wanted.items()
        if name in names
    ]


def _load_trl(setting: Setting, names: Sequence[str]) -> list[Contender]:
    return [Trl(setting)] if "trl" in names else []


@torch.no_grad()
def score(ours: Ours, tokens: list[int]) -> list[float]:
    """Log-prob of every token but the first, by the model that is trained, in the run's dtype."""
    model: Any = ours.prepared.policy.model
    input_ids = torch.tensor([tokens], device=ours.setting.device)
    with autocast(ours.setting):
        logits = model(input_ids=input_ids, use_cache=False).logits[0, :-1]  # [T - 1, V]
    targets = input_ids[0, 1:, None]
    chosen: list[float] = []
    for part, wanted in zip(logits.split(512), targets.split(512), strict=True):
        chosen += part.float().log_softmax(dim=-1).gather(-1, wanted).squeeze(-1).tolist()
    return chosen


def _device_peak(device: str) -> float | None:
    return peak_flops_of(torch.cuda.get_device_name(0)) if device == "cuda" else None


def _list_of(allowed: Sequence[str] | None) -> Callable[[str], list[str]]:
    """Comma-separated words, each one of `allowed`."""

    def parse(text: str) -> list[str]:
        words = [word.strip() for word in text.split(",") if word.strip()]
        wrong = [word for word in words if allowed is not None and word not in allowed]
        if wrong or not words:
            raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(allowed or [])}")
        return words

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    cases = "; ".join(f"{name}: {shape.title}" for name, shape in SHAPES.items())
    add("--cases", type=_list_of(list(SHAPES)), default=["a", "b", "c", "d"], help=cases)
    dtypes = ["float32", "bfloat16"]
    add("--dtype", type=_list_of(dtypes), default=dtypes, help="float32,bfloat16")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--model", default="demo", help=f"a directory, or {', '.join(MODELS)} (default: demo, SmolLM2-135M)")
    add("--contenders", type=_list_of(CONTENDERS), default=list(CONTENDERS), help=", ".join(CONTENDERS))
    packing = "data.packing of ours; several, e.g. auto,padded, show what it gains"
    add("--ours-packing", type=_list_of(None), default=["auto"], help=packing)
    add(
        "--repeats",
        type=int,
        default=3,
        help="measured steps each, after one to warm up (default: 3; 0: gradients only)",
    )
    add("--micro-batch-tokens", type=positive, default=4096, help="budget of a pass (default: 4096)")
    add("--activation-recomputation", action="store_true", help="recompute activations in every contender")
    add("--optimizer-step", action="store_true", help="ours alone, with clipping and AdamW; tokens/s and MFU")
    add("--peak-tflops", type=float, help="of the device in the dtype, for MFU; known for H100, H200, A100")
    add("--seed", type=int, default=0, help="of the batches")
    add("--json", type=Path, help="also write the numbers, every repeat's, here")
    return parser


if __name__ == "__main__":
    main()

"""Where the time of one optimizer step goes, operator by operator.

    python -m benchmarks.gpu.profile --device cuda --model qwen3-0.6b-random --case throughput

One step to warm up (kernels are compiled and tuned in it), one under torch's profiler, in bfloat16 with
activations recomputed. The table is sorted by the device's own time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks._machine import describe, machine
from benchmarks.step.__main__ import score
from benchmarks.step._cases import SHAPES, make_case
from benchmarks.step._contender import Setting
from benchmarks.step._models import MODELS, resolve_model
from benchmarks.step._ours import Ours
from local_stack.command import positive

_ROWS = 40


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile one step and print its table."""
    options = _parser().parse_args(arguments)
    activities = [ProfilerActivity.CPU]
    if options.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with tempfile.TemporaryDirectory(prefix="step-profile-") as scratch:
        setting = Setting(
            model=resolve_model(options.model, Path(scratch)),
            dtype=torch.bfloat16,
            device=torch.device(options.device),
            micro_batch_tokens=options.micro_batch_tokens,
            activation_recomputation=True,
            optimizer_step=True,
            scratch=Path(scratch),
        )
        ours = Ours(setting)
        vocabulary = ours.prepared.policy.limits.vocabulary_size
        case = make_case(
            options.case, vocabulary=vocabulary, score=lambda tokens: score(ours, tokens), seed=0
        )
        ours.prepare(case)
        ours.step()
        with profile(activities=activities) as measured:
            ours.step()
            if options.device == "cuda":
                torch.cuda.synchronize()
    sort_by = "self_cuda_time_total" if options.device == "cuda" else "self_cpu_time_total"
    print(measured.key_averages().table(sort_by=sort_by, row_limit=_ROWS, max_name_column_width=60))
    print(describe(machine(options.device)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--model", default="qwen3-0.6b-random", help=f"a directory, or {', '.join(MODELS)}")
    add("--case", choices=list(SHAPES), default="throughput")
    add("--micro-batch-tokens", type=positive, default=16384)
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""How much memory each process of a run takes at most: whole weights beside weights spread over processes.

    python -m benchmarks.memory --json memory.json

Whole runs by torchrun, on the CPU, of a random Llama of 98M float32 parameters: loading, the self-test, two
steps, a checkpoint after each, the final model; nothing is published. What counts is the peak of the resident
memory (VmHWM) of the fullest process, less that of a process that only imports. It is compared with 16 bytes
a parameter (weights, gradients, two moments) over the processes that share a copy, and 4 bytes for each
parameter of the largest group that is gathered.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._machine import describe, machine
from benchmarks.step._memory import PeakMemory
from benchmarks.step._models import write_random_model
from trainer import RecordedSource, load_config
from trainer.run.build import build_trainer

CASES: Final = ((1, "replicated"), (2, "sharded"), (4, "sharded"))
"""Processes, and `parallel.mode`. Whole weights take no less where there are more processes."""
_STEPS: Final = 2
_MIB: Final = 1 << 20


def model_config(layers: int = 13) -> LlamaConfig:
    """Describe the model: its layers are a little larger than its embedding, which is the head, too."""
    return LlamaConfig(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, and return what `--json` writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=None, help="write the numbers there")
    parser.add_argument("--layers", type=int, default=13)
    parser.add_argument("--measure", nargs=3, metavar=("MODEL", "MODE", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        measure_here(*options.measure)
        return {}
    config = model_config(options.layers)
    parameters, largest = count_parameters(config)
    result: dict[str, Any] = {
        "benchmark": "memory",
        "machine": machine(),
        "settings": {"parameters": parameters, "largest_group": largest, "steps": _STEPS},
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        model = write_random_model(config, Path(scratch) / "model")
        (imports,) = measure_processes(1, "none", model, Path(scratch) / "imports")
        result["imports_bytes"] = imports
        for processes, mode in CASES:
            peaks = measure_processes(processes, mode, model, Path(scratch) / f"{mode}-{processes}")
            sys.stderr.write(f"{processes} {mode}: {max(peaks) / _MIB:.0f} MiB\n")
            parts = processes if mode == "sharded" else 1
            expected = 16 * parameters // parts + 4 * largest
            above = max(peaks) - imports
            row = {"processes": processes, "mode": mode, "peaks_bytes": peaks, "above_imports_bytes": above}
            result["rows"].append(row | {"expected_bytes": expected, "ratio": above / expected})
    console = Console()
    console.print(_table(result))
    console.print(describe(result["machine"]))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def count_parameters(config: LlamaConfig) -> tuple[int, int]:
    """Return a model's parameters, and those of its largest group: a layer, or embedding and norm."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    layer = sum(each.numel() for each in model.model.layers[0].parameters())
    end = sum(each.numel() for each in (model.lm_head.weight, model.model.norm.weight))
    return sum(each.numel() for each in model.parameters()), max(layer, end)


def measure_processes(processes: int, mode: str, model: Path, output: Path) -> list[int]:
    """Run them to their end; returns the peak of each in bytes."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    words = [*launcher, "benchmarks.memory", "--measure", str(model), mode, str(output)]
    # glibc keeps much of what was freed, which would be measured in the place of the trainer, and only on a
    # CPU; pieces of more than 1 MiB it gives back at once then.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(_MIB)}
    subprocess.run([sys.executable, "-m", *words], check=True, env=environment)  # noqa: S603 - ourselves
    return [int(Path(f"{output}.{rank}").read_text(encoding="utf-8")) for rank in range(processes)]


def measure_here(model: str, mode: str, output: str) -> None:
    """Train as one of a run's processes, and write this process's peak; mode `none` only imports."""
    memory = PeakMemory(torch.device("cpu"))
    memory.start()
    if mode != "none":
        words = [
            *("--model.path", model),
            *("--train.output_dir", output),
            *("--train.steps", str(_STEPS)),
            *("--train.device", "cpu"),
            *("--train.mixed_precision", "no"),
            *("--loss.name", "policy_gradient"),
            *("--checkpoint.every", "1"),
            *("--parallel.mode", mode if os.environ["WORLD_SIZE"] != "1" else "replicated"),
        ]
        config = load_config(None, words, environment={})
        build_trainer(config, source=RecordedSource([draw_batch(seed) for seed in range(_STEPS)])).run()
    total = memory.stop().total
    if total is None:
        raise SystemExit("this system does not tell a process's peak memory")
    Path(f"{output}.{os.environ['RANK']}").write_text(str(total), encoding="utf-8")


def draw_batch(seed: int) -> bytes:
    """Draw four groups of four short sequences, as the API sends them."""
    draw = random.Random(seed)
    groups = []
    for _ in range(4):
        prompt = [draw.randrange(256) for _ in range(16)]
        answers = [[draw.randrange(256) for _ in range(16)] for _ in range(4)]
        groups.append(
            {
                "tokens": [prompt + answer for answer in answers],
                "masks": [[-100] * len(prompt) + answer for answer in answers],
                "scores": [draw.random() for _ in answers],
                "inference_logprobs": [[1.0] * len(prompt) + [-9.0] * len(answer) for answer in answers],
                "advantages": None,
                "overrides": None,
                "env_id": 0,
            }
        )
    return json.dumps({"batch": groups}).encode()


def _table(result: dict[str, Any]) -> Table:
    settings = result["settings"]
    imports = f"imports alone take {result['imports_bytes'] / _MIB:.0f} MiB"
    table = Table(title=f"{settings['parameters'] / 1e6:.0f}M parameters; {imports}")
    for title in ("processes", "mode", "peak above imports, MiB", "16 P / N + 4 P', MiB", "ratio"):
        table.add_column(title, justify="right")
    for row in result["rows"]:
        numbers = (f"{row[name] / _MIB:.0f}" for name in ("above_imports_bytes", "expected_bytes"))
        table.add_row(str(row["processes"]), row["mode"], *numbers, f"{row['ratio']:.2f}")
    return table


if __name__ == "__main__":
    main()

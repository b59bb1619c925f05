"""How much memory each process of a run takes at most, by phase: whole weights beside spread ones.

    python -m benchmarks.memory --json memory.json

Whole runs by torchrun, on the CPU, of a random Llama: loading with the self-test, two steps, after each a
publish by `disk` and a checkpoint, the final model. What counts is the peak of the resident memory (VmHWM) of
the fullest process, less what it holds after its imports. It is compared with 16 bytes a parameter
(weights, gradients, two moments) over the processes that share a copy, and 4 bytes for each parameter of the
largest group that is gathered. Beside it stands what the same run takes with a model of nearly no size: what
does not grow with the model.

The inference server is one that holds nothing and answers with the trainer's own log-probs. So it proves
nothing, and takes no memory; the trainer does all that it does for a real one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import trainer.run.build
from benchmarks._machine import describe, machine
from benchmarks.step._memory import PeakMemory
from benchmarks.step._models import write_random_model
from local_stack.command import positive
from trainer import RecordedSource, load_config
from trainer.monitoring import Progress, RunPhase
from trainer.publish import InferenceServer, Probes, ProbeScores
from trainer.publish.interfaces import NextToken
from trainer.run.build import build_trainer
from trainer.run.publish_part import PublishPart

_STEPS: Final = 2
_MIB: Final = 1 << 20
_M_MMAP_THRESHOLD: Final = -3
"""As glibc's malloc.h has it."""
_IMPORTS: Final = "imports"
"""What a process holds before it loads anything."""


@dataclass(frozen=True)
class Case:
    """One run."""

    processes: int
    mode: str
    """`parallel.mode`; with one process weights are whole in any."""
    overlap: bool = False
    """`publish.overlap`: each process holds a copy of what it publishes while the next step trains."""

    def expected(self, parameters: int, largest: int) -> int:
        """Bytes of a process by arithmetic."""
        return 16 * parameters // (self.processes if self.mode == "sharded" else 1) + 4 * largest


CASES: Final = (
    *(Case(1, "replicated"), Case(2, "replicated"), Case(2, "sharded"), Case(4, "sharded")),
    *(Case(1, "replicated", True), Case(2, "sharded", True), Case(4, "sharded", True)),
)


def model_config(layers: int, hidden: int = 768, intermediate: int | None = None) -> LlamaConfig:
    """Describe the model: its layers are a little larger than its embedding, which is the head, too."""
    return LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=intermediate or hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, and return what `--json` writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=None, help="write the numbers there")
    parser.add_argument(
        "--layers", type=positive, default=28, help="7.08M parameters each, and 6.29M beside them"
    )
    parser.add_argument("--cases", default="", help="some only, for example 2:sharded:overlap,1:replicated")
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "OUTPUT"), help=argparse.SUPPRESS)
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    parser.add_argument("--overlap", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        measure_here(*options.measure, mode=options.mode, overlap=options.overlap)
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
        tiny = write_random_model(model_config(2, hidden=64), Path(scratch) / "tiny")
        for case in chosen(options.cases):
            fixed = max(map(above_imports, measure_processes(case, tiny)))
            peaks = measure_processes(case, model)
            above = max(map(above_imports, peaks))
            expected = case.expected(parameters, largest)
            row = {"above_imports_bytes": above, "expected_bytes": expected, "ratio": above / expected}
            result["rows"].append(asdict(case) | row | {"fixed_bytes": fixed, "peaks_bytes": peaks})
            sys.stderr.write(f"{case}: {above / _MIB:.0f} MiB\n")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console = Console(width=180)
    for table in _tables(result):
        console.print(table)
    console.print(describe(result["machine"]))
    return result


def chosen(names: str) -> list[Case]:
    """Return the cases of a comma-separated list, all of them for an empty one."""
    cases = {f"{each.processes}:{each.mode}{':overlap' * each.overlap}": each for each in CASES}
    wanted = names.split(",") if names else list(cases)
    if unknown := set(wanted) - set(cases):
        raise SystemExit(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(cases)}")
    return [cases[name] for name in wanted]


def count_parameters(config: LlamaConfig) -> tuple[int, int]:
    """Return a model's parameters, and those of its largest group: a layer, or embedding and norm."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    layer = sum(each.numel() for each in model.model.layers[0].parameters())
    end = sum(each.numel() for each in (model.lm_head.weight, model.model.norm.weight))
    return sum(each.numel() for each in model.parameters()), max(layer, end)


def above_imports(peaks: dict[str, int]) -> int:
    """Return what one process takes at most, above its imports, in bytes."""
    return max(peaks.values()) - peaks[_IMPORTS]


def measure_processes(case: Case, model: Path) -> list[dict[str, int]]:
    """Return the peaks of each process by phase, in bytes."""
    words = ["--mode", case.mode, *["--overlap"] * case.overlap]
    return run_processes("benchmarks.memory", case.processes, model, words)


def run_processes(module: str, processes: int, model: Path, words: Sequence[str]) -> list[Any]:
    """Run a module by torchrun with `--measure MODEL OUTPUT` and more; returns what each has written."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", module]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(dir=model.parent) as directory:
        output = Path(directory) / "run"
        words = [*launcher, "--measure", str(model), str(output), *words]
        subprocess.run([sys.executable, "-m", *words], check=True, env=environment)  # noqa: S603 - ourselves
        written = [Path(f"{output}.{rank}").read_text(encoding="utf-8") for rank in range(processes)]
    return [json.loads(text) for text in written]


def measure_here(model: str, output: str, *, mode: str, overlap: bool) -> None:
    """Train as one of a run's processes, and write this process's peaks."""
    peaks = PhasePeaks()
    train_here(model, output, mode, ["--publish.transport", "disk", "--publish.overlap", str(overlap)], peaks)
    Path(f"{output}.{os.environ['RANK']}").write_text(json.dumps(peaks.bytes()), encoding="utf-8")


def train_here(
    model: str, output: str, mode: str, words: Sequence[str], progress: Progress | None = None
) -> None:
    """Train as one of a run's processes, to the end, with more settings."""
    # glibc keeps much of what was freed, which would be measured in the place of the trainer, and only on a
    # CPU; pieces of more than 64 KiB it gives back at once then.
    ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    words = [
        *("--model.path", model),
        *("--train.output_dir", output),
        *("--train.steps", str(_STEPS)),
        *("--train.device", "cpu"),
        *("--train.mixed_precision", "no"),
        *("--loss.name", "policy_gradient"),
        *("--checkpoint.every", "1"),
        *("--parallel.mode", mode if os.environ["WORLD_SIZE"] != "1" else "replicated"),
        *("--publish.dtype", "bfloat16"),
        *("--publish.servers", "http://127.0.0.1:9"),
        *words,
    ]
    config = load_config(None, words, environment={})
    Echo.replace_servers()
    source = RecordedSource([draw_batch(seed) for seed in range(_STEPS)])
    build_trainer(config, source=source, progress=progress).run()


class PhasePeaks(Progress):
    """Notes the peak of this process's resident memory in each phase of the training thread."""

    def __init__(self) -> None:
        self._memory = PeakMemory(torch.device("cpu"))
        self._memory.start()
        self._peaks: dict[str, int] = {}
        self._name = _IMPORTS
        self._enter("loading")
        super().__init__()

    def bytes(self) -> dict[str, int]:
        """The peaks so far."""
        self._enter(self._name)
        return self._peaks

    def begin(self, phase: RunPhase, party: str) -> None:
        """See `Progress`."""
        super().begin(phase, party)
        self._enter(phase)

    @contextmanager
    def phase(self, phase: RunPhase, party: str, details: Callable[[], str] | None = None) -> Iterator[None]:
        """See `Progress`."""
        outer = self._name
        self._enter(phase)
        with super().phase(phase, party, details):
            yield
        self._enter(outer)

    def _enter(self, name: str) -> None:
        """Count from here for another phase."""
        total = self._memory.restart().total
        if total is None:
            raise SystemExit("this system does not tell a process's peak memory")
        self._peaks[self._name] = max(total, self._peaks.get(self._name, 0))
        self._name = str(name)


class Echo(InferenceServer):
    """A server that holds nothing: asked for log-probs, it gives those that the trainer computed last."""

    _probes: Probes
    _scores: ProbeScores

    @classmethod
    def replace_servers(cls) -> None:
        """Let it stand for the servers of the run that this process builds next."""
        score = PublishPart.score

        def remember(part: PublishPart, probes: Probes) -> ProbeScores:
            cls._probes, cls._scores = probes, score(part, probes)
            return cls._scores

        PublishPart.score = remember  # type: ignore[method-assign]
        trainer.run.build.build_servers = lambda settings: [cls(settings.servers[0], settings)]

    def score(self, token_id_lists: list[list[int]], **_: Any) -> list[list[float]]:
        """See `InferenceServer`; and so the others."""
        return self._scores.texts

    def next_token(self, token_ids: list[int], **_: Any) -> NextToken:  # noqa: D102
        row = self._scores.next_tokens[self._probes.prompts.index(token_ids)]
        return NextToken(logprobs={0: row[0]})

    def is_paused(self) -> bool:  # noqa: D102
        return False

    def weight_version(self) -> str | None:  # noqa: D102
        return None

    def load_directory(self, path: Path, version: int) -> None:  # noqa: D102
        pass

    def tag(self, version: int) -> None:  # noqa: D102
        pass

    def _nothing(self) -> None:
        pass

    wait_until_ready = pause = reset_caches = resume = _nothing


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


def _tables(result: dict[str, Any]) -> Iterator[Table]:
    settings, rows = result["settings"], result["rows"]
    table = Table(title=f"{settings['parameters'] / 1e6:.0f}M parameters")
    titles = ("peak above imports, MiB", "16 P / N + 4 P', MiB", "ratio", "of it fixed, MiB")
    for title in ("processes", "mode", "publish.overlap", *titles):
        table.add_column(title, justify="right")
    for row in rows:
        names = ("above_imports_bytes", "expected_bytes")
        above, expected, fixed = (f"{row[name] / _MIB:.0f}" for name in (*names, "fixed_bytes"))
        table.add_row(*_name(row), above, expected, f"{row['ratio']:.2f}", fixed)
    yield table
    phases = list(dict.fromkeys(name for row in rows for each in row["peaks_bytes"] for name in each))
    table = Table(title="peak by process and phase, MiB")
    for title in ("processes", "mode", "publish.overlap", "rank", *phases):
        table.add_column(title, justify="right")
    for row in rows:
        for rank, peaks in enumerate(row["peaks_bytes"]):
            said = {name: f"{peak / _MIB:.0f}" for name, peak in peaks.items()}
            table.add_row(*_name(row), str(rank), *(said.get(name, "") for name in phases))
    yield table


def _name(row: dict[str, Any]) -> tuple[str, str, str]:
    return str(row["processes"]), row["mode"], "on" if row["overlap"] else "off"


if __name__ == "__main__":
    main()

"""How much memory a publish takes in each process, above what it holds before, beside what it may take.

    python -m benchmarks.publish_memory --json publish_memory.json

Whole runs by torchrun, on the CPU, as those of `benchmarks.memory`: a random Llama, three of whose weights
are equally large and follow each other. What counts is the peak of the resident memory (VmHWM) from before a
publish reads the weights until they are loaded, less what the process holds when it begins; the largest of
those after the first, which loads code. A publish that overlaps the next step is waited for, so that the step
is not counted. Nor are the log-probs that prove it, which are a forward pass: `publish.verify` is off.

It may take the largest weight as it is published, and two buckets, which are the pieces that are cast and
gathered. Where it goes on while the next step trains also a copy of the own rows, and, by `delta`, what has
changed in them, packed. Merging adapters takes more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM

from benchmarks._machine import describe, machine
from benchmarks.memory import model_config, run_processes, train_here
from benchmarks.step._memory import PeakMemory
from benchmarks.step._models import write_random_model
from trainer.model.sharding import GATHERED_BYTES
from trainer.publish import Publisher, PublishReport
from trainer.publish.delta.bits import Change
from trainer.publish.delta.snapshot import Snapshot
from trainer.run import follower
from trainer.run.orders import Announcement
from trainer.run.publish_part import PublishPart

_MIB: Final = 1 << 20
_BYTES_OF_CHANGE: Final = 1 + 1
"""The distance from the place before, and by how much the number there has moved."""
WAYS: Final = {
    "disk": ["--publish.transport", "disk", "--publish.overlap", "false"],
    "overlap": ["--publish.transport", "disk"],
    "delta": ["--publish.transport", "delta"],
    "merged": ["--publish.transport", "lora", "--publish.overlap", "false", "--model.lora.rank", "8"],
}


@dataclass(frozen=True)
class Case:
    """One run."""

    processes: int
    way: str
    """See `WAYS`."""

    def allowed(self, published: int, largest: int, changed: int) -> int:
        """Bytes of a process by arithmetic.

        Args:
            published: Bytes of all weights as they are published.
            largest: Likewise of the largest one.
            changed: Numbers that have changed among those that this process compares.
        """
        copied = published // self.processes if self.way in ("overlap", "delta") else 0
        return copied + largest + 2 * GATHERED_BYTES + _BYTES_OF_CHANGE * changed


CASES: Final = (
    *(Case(processes, way) for processes in (1, 2, 4) for way in ("disk", "overlap", "delta")),
    Case(2, "merged"),
)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, and return what `--json` writes."""
    names = {f"{case.processes}:{case.way}": case for case in CASES}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=None, help="write the numbers there")
    parser.add_argument("--cases", nargs="+", choices=names, default=list(names), metavar="CASE")
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "OUTPUT"), help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        measure_here(*options.measure, way=options.way)
        return {}
    config = model_config(1, hidden=512, intermediate=16_384)
    with torch.device("meta"):
        sizes = [2 * each.numel() for each in LlamaForCausalLM(config).parameters()]
    published, largest = sum(sizes), max(sizes)
    settings = {"published_bytes": published, "largest_bytes": largest, "bucket_bytes": GATHERED_BYTES}
    result: dict[str, Any] = {"benchmark": "publish_memory", "machine": machine(), "settings": settings}
    result["rows"] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = write_random_model(config, Path(scratch) / "model")
        for case in (names[name] for name in options.cases):
            publishes = run_processes("benchmarks.publish_memory", case.processes, model, ["--way", case.way])
            fullest = [max(each[1:], key=lambda publish: publish["above_bytes"]) for each in publishes]
            for publish in fullest:
                publish["allowed_bytes"] = case.allowed(published, largest, publish["changed"])
            result["rows"].append(asdict(case) | {"by_process": fullest})
            said = ", ".join(f"{publish['above_bytes'] / _MIB:.1f}" for publish in fullest)
            sys.stderr.write(f"{case}: {said} MiB\n")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console = Console(width=180)
    console.print(_table(result))
    console.print(describe(result["machine"]))
    return result


def measure_here(model: str, output: str, *, way: str) -> None:
    """Train as one of a run's processes, and write what each publish took in this one."""
    peaks = PublishPeaks()
    mode = "sharded" if os.environ["WORLD_SIZE"] != "1" else "replicated"
    train_here(model, output, mode, [*WAYS[way], "--publish.verify", "false"])
    Path(f"{output}.{os.environ['RANK']}").write_text(json.dumps(peaks.publishes), encoding="utf-8")


class PublishPeaks:
    """Notes what each publish of the run that this process builds next takes above what it held before."""

    def __init__(self) -> None:
        self.publishes: list[dict[str, int]] = []
        """Bytes of each that has ended, and how many numbers it has found to be changed."""
        self._changed = 0
        self._memory = PeakMemory(torch.device("cpu"))
        self._sending = False
        publisher_class: Any = Publisher
        part_class: Any = PublishPart
        follower_module: Any = follower
        snapshot_class: Any = Snapshot
        start, begin, advance = Publisher.start, Publisher.begin, Snapshot.advance
        send, hear = PublishPart.send, follower.hear

        def start_measured(publisher: Publisher, version: int) -> PublishReport:
            self._memory.start()
            report = start(publisher, version)
            self._note()
            return report

        def begin_measured(publisher: Publisher, version: int) -> None:
            self._memory.start()
            begin(publisher, version)
            publisher.settle()
            self._note()

        def send_measured(part: PublishPart, version: int) -> None:
            self._memory.start()
            send(part, version)
            self._sending = True

        def heard_of_next(*words: Any) -> Announcement:
            announcement = hear(*words)
            if self._sending:  # process 0 announces nothing before it has all
                self._note()
            self._sending = False
            return announcement

        def counted(snapshot: Snapshot, *words: Any, **options: Any) -> dict[str, Change | None] | None:
            changes = advance(snapshot, *words, **options)
            self._changed = sum(each.count for each in (changes or {}).values() if each is not None)
            return changes

        publisher_class.start, publisher_class.begin = start_measured, begin_measured
        part_class.send, follower_module.hear = send_measured, heard_of_next
        snapshot_class.advance = counted

    def _note(self) -> None:
        above = self._memory.stop().above_start
        if above is None:
            raise SystemExit("this system does not tell a process's peak memory")
        self.publishes.append({"above_bytes": above, "changed": self._changed})


def _table(result: dict[str, Any]) -> Table:
    settings = {name: f"{size / _MIB:.0f} MiB" for name, size in result["settings"].items()}
    title = "{published_bytes} published, the largest weight {largest_bytes}, a bucket {bucket_bytes}"
    table = Table(title=title.format(**settings))
    for name in ("processes", "way", "rank", "peak, MiB", "allowed, MiB", "numbers changed"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        for rank, publish in enumerate(row["by_process"]):
            sizes = (f"{publish[name] / _MIB:.1f}" for name in ("above_bytes", "allowed_bytes"))
            table.add_row(str(row["processes"]), row["way"], str(rank), *sizes, str(publish["changed"]))
    return table


if __name__ == "__main__":
    main()

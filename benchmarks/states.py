"""The demo's task with optimizer states and weights in fewer bytes: what is learned from the same batches.

    python -m benchmarks.states --steps 15 --json benchmarks/results/states.json

One run of the demo (`atropos-train local`, all float32) records its batches. Each kind then trains on these
(`atropos-train replay`), publishing every version to an inference server that proves it, and the held-out
additions are sampled from the last one. So nothing differs but the types of states and weights; but for the
first kind, whose weights took part in sampling, the batches are a little off-policy. What has finished is not
run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from benchmarks._machine import describe, machine, package_version
from local_stack.command import positive
from local_stack.commands import Address, evaluate_command, free_addresses, inference_command
from local_stack.health import answers
from local_stack.records import read_accuracy

KINDS: dict[str, list[str]] = {
    "float32": [],
    "8-bit states": ["--optimizer.states", "8bit"],
    "bfloat16 weights": ["--model.dtype", "bfloat16"],
    "both": ["--optimizer.states", "8bit", "--model.dtype", "bfloat16"],
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what has not run yet, then print a line for each kind."""
    args = _parser().parse_args(arguments)
    recorded = args.runs / "recorded"
    if not (recorded / "report.json").exists():
        words = ["local", "--model", args.model, "--seed", str(args.seed), "--steps", str(args.steps)]
        _run([*words, "--run-dir", str(recorded), "--journal.prune", "false"])
    results = {}
    for kind in args.kinds.split(","):
        result = args.runs / kind.replace(" ", "-") / "result.json"
        if not result.exists():
            result.write_text(json.dumps(_train(recorded, result.parent, KINDS[kind], args)))
        results[kind] = json.loads(result.read_text())
        print(kind, results[kind])
    about = machine() | {"torchao": package_version("torchao")}
    print(describe(about))
    if args.json is not None:
        report = json.loads((recorded / "report.json").read_text())
        content = {
            "benchmark": "states",
            "machine": about,
            "steps": args.steps,
            "seed": args.seed,
            "replies": 48 * args.samples,
            "heldout_before": report["heldout_before"],
            "kinds": results,
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def _train(recorded: Path, directory: Path, options: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Train on the recorded batches, and measure what came of it."""
    model = str((recorded / "base-model").resolve())
    directory.mkdir(parents=True, exist_ok=True)
    with _serving(model, directory) as address:
        started = time.monotonic()
        words = ["replay", "--replay.from", str(recorded), "--replay.publish", "--model.path", model]
        words += [
            "--config",
            str(files("local_stack").joinpath("demo.yaml")),
            "--train.steps",
            str(args.steps),
        ]
        words += ["--train.seed", str(args.seed), "--train.output_dir", str(directory / "run")]
        _run([*words, "--publish.servers", address.url, *options])
        seconds = time.monotonic() - started
        evaluations = directory / "evaluations"
        command = evaluate_command(inference=address, model=model, evaluations=evaluations)
        command += ["--env.evaluation_samples", str(args.samples)]
        subprocess.run(command, check=True)  # noqa: S603 - our own program
    rows = [json.loads(line) for line in (directory / "run/metrics.jsonl").read_text().splitlines()]
    publishes = [row for row in rows if row["kind"] == "publish"]
    return {
        "heldout_after": read_accuracy(evaluations),
        "publishes_proven": sum(row["publish_verified"] for row in publishes),
        "publishes": len(publishes),
        "largest_publish_mean_difference": max(row["publish_mean_difference"] for row in publishes),
        "losses": [row["loss"] for row in rows if row["kind"] == "step"],
        "optimizer_bytes": sum(
            path.stat().st_size for path in sorted((directory / "run/checkpoints").iterdir())[-1].glob("opt*")
        ),
        "seconds": round(seconds, 1),
    }


@contextmanager
def _serving(model: str, directory: Path) -> Iterator[Address]:
    (address,) = free_addresses(1)
    with (directory / "inference.log").open("wb") as log:
        server = subprocess.Popen(  # noqa: S603 - our own program
            inference_command(address, model=model, seed=0), stdout=log, stderr=log
        )
    try:
        while not answers(f"{address.url}/health"):
            assert server.poll() is None, directory
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


def _run(words: list[str]) -> None:
    command = [sys.executable, "-m", "trainer.cli", *words]
    subprocess.run(command, check=True)  # noqa: S603 - our own program


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.states",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--kinds", default=",".join(KINDS))
    add("--model", default="demo", help="as of `atropos-train local`; tiny shows that all of it works")
    add("--seed", type=int, default=0)
    add("--steps", type=positive, default=15, help="optimizer steps of a run")
    add("--samples", type=positive, default=16, help="replies to each of the 48 held-out problems")
    add("--runs", type=Path, default=Path("runs/states"), help="where the runs are, one directory each")
    add("--json", type=Path, help="also write the numbers here")
    return parser


if __name__ == "__main__":
    sys.exit(main())

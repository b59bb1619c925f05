"""What a delta costs beside a full version and a restart, by learning rate: part of `benchmarks.publish`.

    python -m benchmarks.publish --transport delta,disk,restart --json deltas.json --picture docs/deltas.png

Two stock vLLM in bfloat16 hold the same model; one has the worker extension. After every step, which moves
each float32 weight by the learning rate up or down (the most that AdamW does as a rule), the same weights are
published to the one as a delta and to the other as a directory, in turns.

Then the trainer's side alone for a model of 1.2 billion weights: bytes, and seconds of copying, for which
training stands still, of comparing and of writing. Its weights are random numbers of a trained model's size.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from trainer.config import load_config
from trainer.publish import Publisher
from trainer.publish.delta.files import Label, write_file
from trainer.publish.delta.snapshot import Snapshot
from trainer.publish.delta.update import Update
from trainer.run.build import build_publisher
from trainer.run.train_state import prepare_run

LEARNING_RATES = (1e-7, 3e-7, 1e-6, 3e-6, 1e-5)
COLUMNS = {
    "weight_bytes": "bytes",
    "capture_seconds": "training stands still",
    "pause_seconds": "generation stands still",
    "total_seconds": "whole publish",
}
_INK, _OURS, _PEER = "#22303c", "#d1691c", "#2a78b8"
_STILL_SECONDS = 2.0
"""Servers are left alone so long before each publish: vLLM keeps a core busy for a second after a request."""
_SPREAD = 0.02
"""Standard deviation of the large model's weights."""


def compare(
    servers: dict[str, str], model: Path, directories: dict[str, Path], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Publish the same versions by each transport, in turns.

    Args:
        servers: URL of each transport's server.
        model: Directory of the model.
        directories: Where each transport's server reads.
        arguments: The command line.

    Returns:
        A row for each publish.
    """
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        models: list[nn.Module] = []
        publishers: dict[str, Publisher] = {}
        for transport, url in servers.items():
            config = load_config(
                None,
                [
                    *("--model.path", str(model), "--train.device", "cpu"),
                    *("--train.output_dir", str(directories[transport].parent)),
                    *("--publish.transport", transport, "--publish.servers", url),
                    *("--publish.directory", str(directories[transport])),
                    *("--publish.dtype", "bfloat16", "--publish.on_failure", "abort"),
                    *(("--publish.delta.anchor_every", "1000") if transport == "delta" else ()),
                ],
                environment={},
            )
            prepared = prepare_run(config)
            models.append(prepared.policy.model)
            between_steps(prepared.policy.model)
            publisher = build_publisher(config, prepared)
            assert publisher is not None
            publishers[transport] = stack.enter_context(publisher)
            publisher.start(0)
            publisher.settle()
        # All rates in each round, so that a machine that becomes slower does so for all; the first warms up.
        rates = [learning_rate for _ in range(arguments.repeats + 1) for learning_rate in LEARNING_RATES]
        for version, learning_rate in enumerate(rates, start=1):
            for each in models:
                step(each, learning_rate, seed=version)
            order = list(publishers) if version % 2 else list(publishers)[::-1]
            for transport in order:
                publisher = publishers[transport]
                publisher.take_reports()
                time.sleep(_STILL_SECONDS)
                publisher.begin(version)
                publisher.settle()
                (report,) = publisher.take_reports()
                if version > len(LEARNING_RATES):
                    numbers = report.metrics().items()
                    row = {key.removeprefix("publish/"): number for key, number in numbers}
                    rows.append({"transport": transport, "learning_rate": learning_rate, **row})
    delta, full = (middle(rows, "weight_bytes", transport=transport) for transport in ("delta", "disk"))
    if delta >= full:
        raise SystemExit("no delta was taken by its server (see above), so there is nothing to compare")
    return rows


def between_steps(model: nn.Module) -> None:
    """Put every weight anywhere between the numbers that round to its bfloat16, as training leaves it.

    A base is stored rounded, so at first steps move little across a border; later it is as after this.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            rounded = parameter.to(torch.bfloat16)
            step_up = (rounded.view(torch.int16) + 1).view(torch.bfloat16).float() - rounded.float()
            share = torch.rand(parameter.shape, generator=generator) - 0.5
            parameter.copy_(rounded.float() + share * step_up)


def step(model: nn.Module, learning_rate: float, *, seed: int) -> None:
    """Move every weight by the learning rate, up or down."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            up = torch.randint(0, 2, parameter.shape, generator=generator, dtype=torch.int8)
            parameter += learning_rate * (2 * up - 1)


def measure_large(repeats: int) -> list[dict[str, Any]]:
    """Bytes and the trainer's seconds for 1.2 billion weights in the shapes of a Llama."""
    if not repeats:
        return []
    shapes = {f"{layer}.{name}": shape for layer in range(16) for name, shape in _LAYER.items()}
    shapes["embed"] = (128256, 2048)
    snapshot, rows, drift = Snapshot(torch.device("cpu")), [], 0.0
    Update(snapshot, 0, _weights(shapes, drift, [])).sum_up()
    with tempfile.TemporaryDirectory(prefix="publish-delta-") as scratch:
        version = 0
        for learning_rate in LEARNING_RATES:
            for _ in range(repeats):
                version, drift = version + 1, drift + learning_rate
                elsewhere: list[float] = []
                started = time.perf_counter()
                update = Update(snapshot, version, _weights(shapes, drift, elsewhere))
                copied = time.perf_counter() - started - sum(elsewhere)
                started = time.perf_counter()
                update.sum_up()
                compared = time.perf_counter() - started
                path = Path(scratch) / "delta"
                started = time.perf_counter()
                label = Label(version=version, checksum="")
                layout = update.choose(whole=False)
                file = write_file(path, label, update.shapes, layout, update.parts, mode=0o700)
                written = time.perf_counter() - started
                rows.append(
                    {
                        "learning_rate": learning_rate,
                        "weight_bytes": file.size,
                        "full_bytes": update.nbytes,
                        "copy_seconds": copied,
                        "compare_seconds": compared,
                        "write_seconds": written,
                    }
                )
    return rows


_LAYER = {
    "q": (2048, 2048),
    "k": (512, 2048),
    "v": (512, 2048),
    "o": (2048, 2048),
    "gate": (8192, 2048),
    "up": (8192, 2048),
    "down": (2048, 8192),
    "norm": (2048,),
}


def _weights(
    shapes: dict[str, tuple[int, ...]], drift: float, elsewhere: list[float]
) -> Iterator[tuple[str, Tensor]]:
    """Make the weights that have drifted so far from the same beginning, each when it is asked for."""
    for place, (name, shape) in enumerate(shapes.items()):
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(place)
        weight = torch.empty(shape).normal_(0.0, _SPREAD, generator=generator)
        weight += drift * (2 * torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) - 1)
        made = weight.to(torch.bfloat16)
        elsewhere.append(time.perf_counter() - started)
        yield name, made


def middle(rows: Sequence[dict[str, Any]], key: str, **fixed: Any) -> float:
    """The median of a number over the rows that have these values."""
    return statistics.median(
        row[key] for row in rows if all(row[name] == value for name, value in fixed.items())
    )


def show(console: Console, rows: Sequence[dict[str, Any]], large: Sequence[dict[str, Any]]) -> None:
    """Print medians by learning rate, and the bars that the transport has to pass."""
    table = Table(title="publish in bfloat16: medians, delta / disk")
    for name in ("learning rate", *COLUMNS.values()):
        table.add_column(name, justify="right")
    for learning_rate in LEARNING_RATES:
        cells = [f"{learning_rate:.0e}"]
        for key in COLUMNS:
            ours, theirs = (
                middle(rows, key, transport=transport, learning_rate=learning_rate)
                for transport in ("delta", "disk")
            )
            if key == "weight_bytes":
                cells.append(f"{ours / 1e6:.1f} / {theirs / 1e6:.0f} MB: {ours / theirs:.1%}")
            else:
                cells.append(f"{ours:.2f} / {theirs:.2f} s: {ours / theirs:.2f}")
        table.add_row(*cells)
    console.print(table)
    if not large:
        return
    table = Table(title="1.2 billion weights, trainer alone: medians")
    for name in ("learning rate", "bytes", "of a full version", "copy", "compare", "write the delta"):
        table.add_column(name, justify="right")
    for learning_rate in LEARNING_RATES:
        numbers = {key: middle(large, key, learning_rate=learning_rate) for key in large[0]}
        table.add_row(
            f"{learning_rate:.0e}",
            f"{numbers['weight_bytes'] / 1e6:.0f} MB",
            f"{numbers['weight_bytes'] / numbers['full_bytes']:.1%}",
            *(f"{numbers[f'{part}_seconds']:.2f} s" for part in ("copy", "compare", "write")),
        )
    console.print(table)


def draw(rows: Sequence[dict[str, Any]], large: Sequence[dict[str, Any]], path: Path) -> None:
    """Cost by learning rate as a PNG: bytes, pause, whole publish."""
    figure = Figure(figsize=(10.0, 3.2), dpi=160, layout="constrained")
    titles = ("bytes, share of a full version", "generation stands still, seconds", "whole publish, seconds")
    for axes, title in zip(figure.subplots(1, 3), titles, strict=True):
        axes.set_title(title, fontsize=9, color=_INK)
        axes.set_xscale("log")
        axes.set_xlabel("learning rate", fontsize=8, color=_INK)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    places = list(LEARNING_RATES)
    first, *others = figure.axes
    full = middle(rows, "weight_bytes", transport="disk")
    shares = [middle(rows, "weight_bytes", transport="delta", learning_rate=each) / full for each in places]
    first.plot(places, shares, "o-", color=_OURS, label="135M")
    if large:
        full = large[0]["full_bytes"]
        shares = [middle(large, "weight_bytes", learning_rate=each) / full for each in places]
        first.plot(places, shares, "s--", color=_OURS, alpha=0.6, label="1.2B")
    first.axhline(1.0, color=_PEER, label="disk")
    first.set_yscale("log")
    for axes, key in zip(others, ("pause_seconds", "total_seconds"), strict=True):
        for transport, colour in (("delta", _OURS), ("disk", _PEER)):
            numbers = [middle(rows, key, transport=transport, learning_rate=each) for each in places]
            axes.plot(places, numbers, "o-", color=colour, label=transport)
        axes.set_ylim(bottom=0)
    for axes in figure.axes:
        axes.legend(fontsize=8, frameon=False)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png")

"""Short runs of the real trainer on recorded batches."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from trainer import RecordedSource, RunSummary, load_config
from trainer.run.build import build_trainer


def run(model: Path, output: Path, bodies: Iterable[bytes], *overrides: str, steps: int = 4) -> RunSummary:
    config = load_config(
        None,
        [
            *("--model.path", str(model)),
            *("--train.output_dir", str(output)),
            *("--train.steps", str(steps)),
            *("--train.device", "cpu"),
            *("--train.mixed_precision", "no"),  # whatever this machine multiplies best
            *("--optimizer.learning_rate", "1e-3"),
            *("--loss.name", "policy_gradient"),
            *("--checkpoint.every", "2"),
            *overrides,
        ],
        environment={},
    )
    return build_trainer(config, source=RecordedSource(bodies)).run()


def rows(output: Path, kind: str = "step") -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def assert_equal_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert different == []

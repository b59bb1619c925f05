"""Directories of runs, made for looking at them: as the trainer writes them, without training."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from atropos_client.journal import Journal
from tests.trainer.batches import make_body
from trainer.checkpoints.manifest import write_manifest


def step_row(step: int, **values: Any) -> dict[str, Any]:
    """A row of a step, as long as a real one."""
    row = {
        "kind": "step",
        "step": step,
        "policy_version": step,
        "batch": step,
        "reward_mean": step / 1000,
        "loss": -0.5,
        "grad_norm": 2.0,
        "mismatch_kl": 0.001,
        "entropy": 1.5,
        "staleness": 1,
        "tokens_per_second": 1000.0,
        "waiting_seconds": 1.0,
        "training_seconds": 2.0,
        "publishing_seconds": 0.5,
        "set_aside_share": 0.0,
        "idle_seconds": None,
    }
    return {**row, **{f"intake_counter_{number}": number for number in range(40)}, **values}


def write_metrics(directory: Path, rows: Iterable[dict[str, Any]]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "metrics.jsonl"
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def write_configuration(directory: Path, **sections: dict[str, Any]) -> None:
    """A checkpoint that says how the run is configured, and no more."""
    checkpoint = directory / "checkpoints/step-000000"
    checkpoint.mkdir(parents=True)
    data = {"advantage_estimator": "group_center", "advantage_options": {}, "advantage_normalization": "none"}
    configuration = {"data": data, "train": {"steps": 100}, "loss": {"name": "policy_gradient"}}
    write_manifest(checkpoint, configuration=configuration | sections, versions={})


def write_journal(directory: Path, bodies: Iterable[bytes], *, trained: int = 1 << 30) -> None:
    """A journal whose first batches were trained."""
    with Journal.open(directory / "journal") as journal:
        for body in bodies:
            number = journal.append(body, served_version=journal.last_number - 1)
            if number <= trained:
                journal.settle(number, "trained", step=number)


def body_of(*groups: dict[str, Any]) -> bytes:
    return json.dumps({"batch": list(groups)}).encode()


def group_of(
    prompt: list[int], answers: list[list[int]], scores: list[float], **extra: Any
) -> dict[str, Any]:
    """A group whose sequences share a prompt; the sampler's log-probs are -1, -2, ... in each answer."""
    return {
        "tokens": [prompt + answer for answer in answers],
        "masks": [[-100] * len(prompt) + answer for answer in answers],
        "scores": scores,
        "inference_logprobs": [
            [1.0] * len(prompt) + [-float(place + 1) for place in range(len(answer))] for answer in answers
        ],
        "env_id": 0,
        **extra,
    }


def make_run(directory: Path, *, steps: int = 5, groups: int = 3, **sections: dict[str, Any]) -> Path:
    """A small run with everything in it; `sections` are of its configuration."""
    generator = random.Random(0)
    write_metrics(
        directory,
        [
            row
            for step in range(1, steps + 1)
            for row in (
                step_row(step, reward_mean=step / steps, loss=generator.gauss(0, 1)),
                {
                    "kind": "publish",
                    "step": step,
                    "version": step,
                    "publish_verified": True,
                    "publish_seconds": 4.0,
                    "publish_mean_difference": 1e-5,
                    "publish_max_difference": 1e-4,
                },
            )
        ],
    )
    write_configuration(directory, **sections)
    write_journal(directory, [make_body(seed, groups=groups) for seed in range(steps)])
    return directory

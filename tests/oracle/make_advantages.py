"""Writes advantages.json: what verl 0.9.1 makes of batches of scores.

The tests only read the file. It is written in an environment of its own, because verl pins other packages
than ours::

    python -m venv oracle && . oracle/bin/activate
    pip install torch==2.13.0 numpy omegaconf tensordict transformers && pip install --no-deps verl==0.9.1
    python tests/oracle/make_advantages.py > tests/oracle/advantages.json

verl imports ray and orjson, which none of this needs: stand-ins take their place if they are not installed.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import random
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch

BATCHES = 6
GROUPS = 8
LONGEST = 12  # trained tokens


def core_algos() -> Any:
    """verl's module of that name."""
    while True:
        try:
            return importlib.import_module("verl.trainer.ppo.core_algos")
        except ModuleNotFoundError as error:
            if not error.name or error.name.startswith("verl") or error.name in sys.modules:
                raise
            stand_in = MagicMock()
            stand_in.__spec__ = importlib.machinery.ModuleSpec(error.name, None)
            stand_in.__path__ = []
            sys.modules[error.name] = stand_in
            for name in [name for name in sys.modules if name.partition(".")[0] == "verl"]:
                del sys.modules[name]


def make_batch(generator: random.Random, kind: int) -> list[dict[str, list[float]]]:
    """Groups of unlike sizes; scores of 0 and 1, or any; the largest magnitude of each group is 1.

    The last is because ours adds to a standard deviation a share of the largest score, and verl an absolute
    number: they are the same there.
    """
    groups = []
    for _ in range(GROUPS):
        size = generator.randint(2, 9)
        if kind % 2:
            scores = [float(generator.random() < 0.4) for _ in range(size)]
        else:
            scores = [generator.uniform(-1, 1) for _ in range(size)]
        scores[generator.randrange(size)] = 1.0
        groups.append({"scores": scores, "trained_tokens": [generator.randint(1, LONGEST) for _ in scores]})
    return groups


def estimate(verl: Any, groups: list[dict[str, list[float]]]) -> dict[str, list[list[float]]]:
    """Each function's advantage of each sequence, by our name of it."""
    lengths = [int(count) for group in groups for count in group["trained_tokens"]]
    index = np.array([number for number, group in enumerate(groups) for _ in group["scores"]])
    mask = torch.zeros(len(lengths), LONGEST, dtype=torch.float64)
    rewards = torch.zeros_like(mask)
    for row, (length, score) in enumerate(
        zip(lengths, (score for group in groups for score in group["scores"]), strict=True)
    ):
        mask[row, :length] = 1.0
        rewards[row, length - 1] = score
    arguments = {"token_level_rewards": rewards, "response_mask": mask, "index": index}
    with_std = SimpleNamespace(get=lambda name, default=None: default)
    advantages = {
        "group_norm": verl.compute_grpo_outcome_advantage(**arguments),
        "group_center": verl.compute_grpo_outcome_advantage(**arguments, norm_adv_by_std_in_grpo=False),
        "leave_one_out": verl.compute_rloo_outcome_advantage(**arguments),
        "opo": verl.compute_opo_outcome_advantage(**arguments),
        "pass_at_k": verl.compute_grpo_passk_outcome_advantage(**arguments, config=with_std),
        "gpg": verl.compute_gpg_outcome_advantage(**arguments),
        "reinforce_plus_plus_baseline": verl.compute_reinforce_plus_plus_baseline_outcome_advantage(
            **arguments
        ),
    }
    sizes = [len(group["scores"]) for group in groups]
    return {
        name: [part.tolist() for part in of_tokens[:, 0].split(sizes)]
        for name, (of_tokens, _) in advantages.items()
    }


def main() -> None:
    """Write the batches with verl's answers."""
    torch.set_default_dtype(torch.float64)  # verl divides two counts
    verl = core_algos()
    generator = random.Random(0)
    batches = []
    for kind in range(BATCHES):
        groups = make_batch(generator, kind)
        batches.append({"groups": groups, "advantages": estimate(verl, groups)})
    json.dump({"verl": "0.9.1", "batches": batches}, sys.stdout)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()

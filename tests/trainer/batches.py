"""Recorded batches for a tiny byte-level model, as the API would send them."""

from __future__ import annotations

import json
import random
from typing import Any

VOCABULARY = 259


def make_group(
    generator: random.Random,
    *,
    size: int = 4,
    env_id: int = 0,
    scores: list[float] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    prompt = [generator.randrange(VOCABULARY) for _ in range(generator.randint(3, 10))]
    completions = [
        [generator.randrange(VOCABULARY) for _ in range(generator.randint(1, 8))] for _ in range(size)
    ]
    return {
        "tokens": [prompt + completion for completion in completions],
        "masks": [[-100] * len(prompt) + completion for completion in completions],
        "scores": scores or [generator.random() for _ in range(size)],
        "inference_logprobs": [
            [1.0] * len(prompt) + [-generator.uniform(4, 7) for _ in completion] for completion in completions
        ],
        "advantages": None,
        "overrides": None,
        "env_id": env_id,
        **extra,
    }


def make_body(seed: int, *, groups: int = 3, **extra: Any) -> bytes:
    generator = random.Random(seed)
    return json.dumps({"batch": [make_group(generator, **extra) for _ in range(groups)]}).encode()


def make_bodies(count: int, *, first_seed: int = 0) -> list[bytes]:
    return [make_body(first_seed + number) for number in range(count)]

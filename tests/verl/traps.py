"""A batch that has everything which an integration into verl can get wrong and stay silent."""

from __future__ import annotations

import json
import random
from typing import Any

from tests.trainer.batches import VOCABULARY

IGNORED = -100


def trap_body(seed: int = 0) -> bytes:
    """Four groups of four conversations of several turns, as the API would send them."""
    generator = random.Random(seed)
    groups = [_group(generator) for _ in range(4)]
    # Advantages token by token win over the scores, and differ within a sequence.
    groups[0]["advantages"] = [[generator.uniform(-1, 1) for _ in row] for row in groups[0]["tokens"]]
    # Its siblings' advantages stay what they are, and the sequence counts in the denominator.
    groups[1]["overrides"] = [{"set_advantage_to_zero": True}, {}, {}, {}]
    # No spread: no gradient, and all its tokens count in the denominator.
    groups[2]["scores"] = [0.5] * 4
    groups[3]["group_overrides"] = {"temperature": 0.7}
    return json.dumps({"batch": groups}).encode()


def _group(generator: random.Random) -> dict[str, Any]:
    conversations = [_conversation(generator) for _ in range(4)]
    tokens, masks, logprobs = (list(column) for column in zip(*conversations, strict=True))
    return {
        "tokens": tokens,
        "masks": masks,
        "scores": [generator.random() for _ in range(4)],
        "inference_logprobs": logprobs,
        "env_id": 0,
    }


def _conversation(generator: random.Random) -> tuple[list[int], list[int], list[float]]:
    """Prompt, reply, what a tool said, reply, and once more a tool: holes, and an end that is not trained."""
    tokens: list[int] = []
    masks: list[int] = []
    logprobs: list[float] = []
    for part, longest in enumerate((6, 5, 4, 5, 2)):
        words = [generator.randrange(VOCABULARY) for _ in range(generator.randint(1, longest))]
        trained = part in (1, 3)
        tokens += words
        masks += words if trained else [IGNORED] * len(words)
        # 1.0 is the filler of Atropos: a policy loss that read it would see a ratio of 0.0009.
        logprobs += [-generator.uniform(4, 7) if trained else 1.0 for _ in words]
    return tokens, masks, logprobs

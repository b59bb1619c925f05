"""An Atropos environment that sends a teacher's likeliest tokens at each position of random texts.

    python -m tests.environments.teacher API_URL TEACHER_DIRECTORY

It needs no inference server: a teacher's word on any text teaches the student that reads it.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
from typing import Any

import torch
from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ScoredDataGroup
from transformers import AutoModelForCausalLM

GROUP_SIZE = 4
LENGTH = 24
CANDIDATES = 32


class Teacher(BaseEnv):  # type: ignore[misc] # atroposlib ships no annotations
    """Random tokens, all but the first of them to be learned."""

    env_config_cls = BaseEnvConfig
    directory: str
    _seeds = itertools.count()

    async def setup(self) -> None:
        """Load the teacher."""
        self.model = AutoModelForCausalLM.from_pretrained(self.directory).eval()

    async def get_next_item(self) -> int:
        """Return the seed of a group."""
        return next(self._seeds)

    async def evaluate(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing to measure."""

    async def collect_trajectories(self, item: int) -> tuple[ScoredDataGroup, list[Any]]:
        """Draw texts, and ask the teacher for the candidates of each token; the first has none."""
        tokens = random_texts(item, self.model.config.vocab_size, count=GROUP_SIZE)
        with torch.no_grad():
            logprobs = self.model(torch.tensor(tokens)).logits.log_softmax(-1)[:, :-1]
        best = logprobs.topk(CANDIDATES)
        group = ScoredDataGroup(
            tokens=tokens,
            masks=[[-100, *row[1:]] for row in tokens],
            scores=[0.0] * GROUP_SIZE,
            distill_token_ids=[[[], *row] for row in best.indices.tolist()],
            distill_logprobs=[[[], *row] for row in best.values.tolist()],
            group_overrides={},
        )
        return group, []


def random_texts(seed: int, vocabulary: int, *, count: int) -> list[list[int]]:
    """[count][LENGTH] token ids."""
    generator = random.Random(seed)
    return [[generator.randrange(vocabulary) for _ in range(LENGTH)] for _ in range(count)]


async def serve(api: str, directory: str) -> None:
    """Run it until the process is ended."""
    config = BaseEnvConfig(
        group_size=GROUP_SIZE,
        tokenizer_name=directory,
        rollout_server_url=api,
        use_wandb=False,
        wandb_name="teacher",
        total_steps=-1,
        steps_per_eval=0,
        max_batches_offpolicy=2,
        ensure_scores_are_not_same=False,
    )
    Teacher.directory = directory
    nobody = APIServerConfig(
        base_url="http://127.0.0.1:9/v1", model_name="none", api_key="x", health_check=False
    )
    await Teacher(config, [nobody]).env_manager()


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))

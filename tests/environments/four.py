"""Four Atropos environments without a data set, one of each shape, in one process.

    python -m tests.environments.four API_URL INFERENCE_URL MODEL_DIRECTORY

Each takes what its upstream equals do: one turn or several through `ManagedServer`, token advantages of its
own, or the OpenAI API alone, where text is tokenized a second time and there are no log-probs. A reply's
score depends on its tokens, so that a model of random weights gets all kinds of scores.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from typing import Any

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ScoredDataGroup

GROUP_SIZE = 4
NAMES = ("one_turn", "two_turns", "token_advantages", "openai_only")
"""In the order in which they register: the place is the environment's number at the API."""
SAMPLING = {"max_tokens": 6, "temperature": 1.0, "split": "train"}


class SmallEnvironment(BaseEnv):  # type: ignore[misc] # atroposlib ships no annotations
    """What the four have in common: prompts are numbered, groups are built in one place."""

    env_config_cls = BaseEnvConfig
    _numbers = itertools.count()

    async def setup(self) -> None:
        """Nothing to load."""

    async def get_next_item(self) -> str:
        """Return the next prompt."""
        return f"Count from {next(self._numbers)}:"

    async def evaluate(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing to measure."""

    def group(self, nodes: list[Any], **more: Any) -> tuple[ScoredDataGroup, list[Any]]:
        """A group of rollouts, and an empty backlog."""
        fields: dict[str, Any] = {
            "tokens": [node.tokens for node in nodes],
            "masks": [node.masked_tokens for node in nodes],
            "inference_logprobs": [node.logprobs for node in nodes],
            "scores": [score(node.tokens) for node in nodes],
            "group_overrides": {},
        }
        return ScoredDataGroup(**(fields | more)), []


class OneTurn(SmallEnvironment):
    """One prompt, all replies in one request."""

    async def collect_trajectories(self, item: str) -> tuple[ScoredDataGroup, list[Any]]:
        """Sample a group."""
        async with self.server.managed_server(tokenizer=self.tokenizer) as managed:
            await managed.completion(prompt=item, n=GROUP_SIZE, **SAMPLING)
            return self.group(managed.get_state()["nodes"])


class TwoTurns(SmallEnvironment):
    """The environment answers the first reply, and the model goes on; both replies are trained on."""

    async def collect_trajectories(self, item: str) -> tuple[ScoredDataGroup, list[Any]]:
        """Sample a group."""
        return self.group(await asyncio.gather(*(self._rollout(item) for _ in range(GROUP_SIZE))))

    async def _rollout(self, item: str) -> Any:
        messages = [{"role": "user", "content": item}]
        async with self.server.managed_server(tokenizer=self.tokenizer) as managed:
            # Not managed.completion: atroposlib 0.4.0 masks the earlier turns there.
            reply = await managed.chat_completion(messages=messages, n=1, **SAMPLING)
            messages += [
                {"role": "assistant", "content": reply.choices[0].message.content},
                {"role": "user", "content": "Go on."},
            ]
            await managed.chat_completion(messages=messages, n=1, **SAMPLING)
            (node,) = managed.get_state()["nodes"]
            return node


class TokenAdvantages(OneTurn):
    """The first trained token is rewarded, the others are punished, whatever the scores say."""

    def group(self, nodes: list[Any], **more: Any) -> tuple[ScoredDataGroup, list[Any]]:
        """A group whose advantages are its own."""
        return super().group(nodes, advantages=[token_advantages(node.masked_tokens) for node in nodes])


class OpenaiOnly(SmallEnvironment):
    """Knows texts only."""

    async def collect_trajectories(self, item: str) -> tuple[ScoredDataGroup, list[Any]]:
        """Sample a group and tokenize it."""
        messages = [{"role": "user", "content": item}]
        reply = await self.server.chat_completion(messages=messages, n=GROUP_SIZE, **SAMPLING)
        prompt = self.tokenizer.encode(item)
        tokens = [prompt + self.tokenizer.encode(each.message.content or ".") for each in reply.choices]
        return self.group(
            [],
            tokens=tokens,
            masks=[[-100] * len(prompt) + row[len(prompt) :] for row in tokens],
            scores=[score(row) for row in tokens],
            inference_logprobs=None,
        )


def score(tokens: list[int]) -> float:
    """A number that differs between most replies."""
    return sum(tokens) % 101 / 100


def token_advantages(masks: list[int]) -> list[float]:
    """What `TokenAdvantages` sends for a sequence."""
    first = next(column for column, mask in enumerate(masks) if mask != -100)
    return [0.0 if mask == -100 else (2.0 if t == first else -0.5) for t, mask in enumerate(masks)]


async def serve(api: str, inference: str, model: str) -> None:
    """Run all four until the process is ended."""
    kinds = (OneTurn, TwoTurns, TokenAdvantages, OpenaiOnly)
    running = []
    for name, kind in zip(NAMES, kinds, strict=True):
        config = BaseEnvConfig(
            group_size=GROUP_SIZE,
            tokenizer_name=model,
            rollout_server_url=api,
            use_wandb=False,
            wandb_name=name,
            total_steps=-1,
            steps_per_eval=0,
            max_batches_offpolicy=1,
            min_batch_allocation=1 / len(kinds),  # every batch has a group of each
            ensure_scores_are_not_same=False,
        )
        server = APIServerConfig(
            server_type="openai" if kind is OpenaiOnly else "vllm",
            base_url=f"{inference}/v1",
            model_name="tiny",
            tokenizer_name=model,
            api_key="x",
            health_check=False,
        )
        environment = kind(config, [server])
        running.append(asyncio.create_task(environment.env_manager()))
        while not hasattr(environment, "env_id"):  # so that their numbers are known
            await asyncio.sleep(0.05)
            if running[-1].done():
                break
    await asyncio.gather(*running)


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))

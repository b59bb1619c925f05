"""The demonstration task as a real Atropos environment.

    python -m local_stack.environment serve    --env.rollout_server_url URL --openai.base_url URL/v1 ...
    python -m local_stack.environment evaluate --env.data_dir_to_save_evals DIR --openai.base_url URL/v1 ...

Every group is one problem and `group_size` replies to it, sampled in one request. Tokens, masks and
log-probs are the sampler's own, from Atropos's `ManagedServer`: nothing is tokenized a second time.

Environment variable `ATROPOS_ENVIRONMENT_LOG` sets the lowest level of log lines (default INFO).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ScoredDataGroup
from pydantic import Field
from tenacity import RetryError

from atropos_client.readable import require_readable
from local_stack.arithmetic import Addition, share_right, split_problems, training_order
from local_stack.health import answers
from local_stack.turns import UNPUBLISHED, Turns

logger = logging.getLogger(__name__)


class ArithmeticConfig(BaseEnvConfig):  # type: ignore[misc] # atroposlib ships no annotations
    """Atropos's own settings with this task's defaults, and a few of its own."""

    group_size: int = Field(default=8, ge=1, description="Replies sampled for each problem")
    wandb_name: str | None = Field(default="arithmetic", description="Name under which the API lists it")
    use_wandb: bool = Field(default=False, description="Whether to send the environment's metrics to wandb")
    total_steps: int = Field(
        default=1_000_000,
        description="Batches after which the environment ends by itself; in practice the trainer decides",
    )
    # The API counts a queue in batches; one is enough to never let the trainer wait for long, and every
    # further one would be sampled by weights that are one step older.
    max_batches_offpolicy: int = Field(default=1, description="Batches that may wait in the API's queue")
    # A group whose scores are all equal still reaches the trainer, which counts it and knows what to do; and
    # the mean reward that the trainer shows stays the mean reward of all that was sampled.
    ensure_scores_are_not_same: bool = Field(default=False, description="Drop groups whose scores are equal")
    # A whole batch of groups at once, so that the inference server can compute them together.
    max_num_workers_per_node: int = Field(default=16, ge=1, description="Groups sampled at once, per server")
    steps_per_eval: int = Field(default=0, description="Steps between two evaluations while serving; 0: none")
    max_new_tokens: int = Field(default=16, ge=1, description="Longest reply, in tokens")
    temperature: float = Field(default=1.0, gt=0, description="Sampling temperature, training and evaluation")
    seed: int = Field(default=0, ge=0, description="Seed of the order of the training problems")
    evaluation_samples: int = Field(
        default=4,
        ge=1,
        description="Replies sampled for each held-out problem; more make the score less noisy",
    )
    evaluate_before_training: bool = Field(
        default=False,
        description="serve: evaluate before the first rollout, once, into data_dir_to_save_evals",
    )
    on_policy: bool = Field(
        default=True,
        description="Sample one training batch for each version of the weights, then wait for the next",
    )
    ready_timeout: float = Field(default=600.0, gt=0, description="Seconds to wait for the servers")


class ArithmeticEnvironment(BaseEnv):  # type: ignore[misc] # atroposlib ships no annotations
    """Additions of two numbers up to 20, scored by the last number of the reply."""

    name = "arithmetic"
    env_config_cls = ArithmeticConfig

    @classmethod
    def config_init(cls) -> tuple[ArithmeticConfig, list[APIServerConfig]]:
        """Return the defaults that the command line overrides."""
        server = APIServerConfig(
            server_type="vllm",
            base_url="http://127.0.0.1:9001/v1",
            model_name="policy",
            timeout=600,
            # The OpenAI client that atroposlib builds insists on a key; our servers ask for none.
            api_key="unused",
        )
        return ArithmeticConfig(), [server]

    def __init__(self, config: ArithmeticConfig, *args: Any, **kwargs: Any) -> None:
        require_readable(config.tokenizer_name)
        super().__init__(config, *args, **kwargs)

    async def setup(self) -> None:
        """Wait for the inference server; with `evaluate_before_training`, measure the untrained model."""
        self._problems = training_order(self.config.seed)
        await self._wait_for_inference()
        if self.config.evaluate_before_training and not self._has_evaluated():
            await self.evaluate()
        self._turns: Turns | None = None  # the batch size is known after registration
        self._turn_of_task: dict[asyncio.Task[Any] | None, str | None] = {}

    async def get_status(self) -> None:
        """Ask how much is queued; an API that was restarted has forgotten us, so register again.

        Raises:
            RetryError: The API cannot be reached for `ready_timeout` seconds.
        """
        deadline = time.monotonic() + self.config.ready_timeout
        while True:
            try:
                await super().get_status()
            except RetryError as error:  # of BaseEnv, after three attempts
                if time.monotonic() > deadline:
                    raise
                reason = error.last_attempt.exception()
            else:
                return
            if not isinstance(reason, aiohttp.ClientResponseError):
                logger.warning("The API at %s does not answer: %s", self.config.rollout_server_url, reason)
                continue
            logger.warning(
                "The API at %s does not know us: registering again", self.config.rollout_server_url
            )
            with contextlib.suppress(RetryError):
                await self.register_env()
                await self.get_server_info()
                self._turns = None  # what was sent for this version is gone: it may be sampled again

    async def get_next_item(self) -> Addition:
        """Return the next problem to sample replies for."""
        return next(self._problems)

    async def handle_env(self, item_uuid: str) -> Any:
        """Roll out one item and send its group; a turn for which none was sent goes to another group."""
        task = asyncio.current_task()
        group = None
        try:
            group = await super().handle_env(item_uuid)  # None if it failed; BaseEnv may cancel it, too
        finally:
            turn = self._turn_of_task.pop(task, None)
            if self._turns is not None:
                flat = group is not None and len(group["scores"]) > 1 and len(set(group["scores"])) == 1
                if group is None or (flat and self.config.ensure_scores_are_not_same):
                    self._turns.give_back(turn)
                elif flat:
                    self._turns.note_flat(turn)
        return group

    async def collect_trajectories(self, item: Addition) -> tuple[ScoredDataGroup, list[Addition]]:
        """Sample and score one group; the second element, the backlog, is always empty."""
        self._turn_of_task[asyncio.current_task()] = await self._take_turn()
        sampled = await self._sample(item, count=self.config.group_size, split="train")
        group = ScoredDataGroup(
            tokens=[node.tokens for node, _ in sampled],
            masks=[node.masked_tokens for node, _ in sampled],
            inference_logprobs=[node.logprobs for node, _ in sampled],
            scores=[item.score(reply) for _, reply in sampled],
            generation_params={"temperature": self.config.temperature},
            # BaseEnv reads a group size from group_overrides and cannot take None here.
            group_overrides={},
            advantages=None,
            messages=None,
            images=None,
        )
        return group, []

    async def evaluate(self, *_args: Any, **_kwargs: Any) -> None:
        """Score samples of every held-out problem and write the accuracy to `data_dir_to_save_evals`."""
        started = time.time()
        _, held_out = split_problems()
        groups = await asyncio.gather(
            *(self._sample(item, count=self.config.evaluation_samples, split="eval") for item in held_out)
        )
        replies = [
            (item, reply) for item, sampled in zip(held_out, groups, strict=True) for _, reply in sampled
        ]
        scores = [item.score(reply) for item, reply in replies]
        accuracy = share_right(scores)
        logger.info("held-out accuracy %.1f%% over %d replies", 100 * accuracy, len(scores))
        await self.evaluate_log(
            metrics={"accuracy": accuracy, "mean_score": sum(scores) / len(scores), "replies": len(scores)},
            samples=[
                {"question": item.question, "reply": reply, "score": item.score(reply)}
                for item, reply in replies
            ],
            start_time=started,
            end_time=time.time(),
            generation_parameters={
                "temperature": self.config.temperature,
                "max_new_tokens": self.config.max_new_tokens,
            },
            verbose=False,
        )

    def _has_evaluated(self) -> bool:
        """Whether an environment that was restarted measured the untrained model, which is no more."""
        directory = self.config.data_dir_to_save_evals
        return directory is not None and (Path(directory) / "metrics.json").exists()

    async def _sample(self, item: Addition, *, count: int, split: str) -> list[tuple[Any, str]]:
        """Return `count` pairs of (node with tokens, masked tokens and log-probs; text of the reply)."""
        async with self.server.managed_server(tokenizer=self.tokenizer) as managed:
            completion = await managed.chat_completion(
                messages=[{"role": "user", "content": item.question}],
                n=count,
                max_tokens=self.config.max_new_tokens,
                temperature=self.config.temperature,
                split=split,
            )
            nodes = managed.get_state()["nodes"]
        replies = [choice.message.content or "" for choice in completion.choices]
        return list(zip(nodes, replies, strict=True))

    async def _take_turn(self) -> str | None:
        """Wait until it is this group's turn; without `on_policy`, at once."""
        if not self.config.on_policy:
            return None
        if self._turns is None:
            groups = max(1, self.config.batch_size // self.config.group_size)
            url = self.server.servers[0].config.base_url.removesuffix("/v1") + "/weight_info"
            self._turns = Turns(lambda: _weight_version(url), per_version=groups)
        return await self._turns.take()

    async def _wait_for_inference(self) -> None:
        """Return once every inference server answers `/health`.

        Atropos's own health check runs beside the first request, which it does not hold back.
        """
        deadline = time.monotonic() + self.config.ready_timeout
        for server in self.server.servers:
            url = server.config.base_url.removesuffix("/v1") + "/health"
            while not await asyncio.to_thread(answers, url):
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"no inference server answered at {url} within {self.config.ready_timeout:g} s; "
                        "start it, or correct --openai.base_url"
                    )
                await asyncio.sleep(0.2)


async def _weight_version(url: str) -> str | None:
    """The version that a server serves; None if it does not tell. One that is down serves none."""
    timeout = aiohttp.ClientTimeout(total=30)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as response:
            return str((await response.json())["weight_version"]) if response.ok else None
    except (aiohttp.ClientConnectionError, TimeoutError):
        return UNPUBLISHED
    except (aiohttp.ClientError, KeyError, ValueError):
        return None


def main() -> None:
    """Run Atropos's command line (serve, process, evaluate) for this environment."""
    logging.basicConfig(
        level=os.environ.get("ATROPOS_ENVIRONMENT_LOG", "INFO").upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    # BaseEnv logs its queue ten times a second at INFO, and every HTTP request is another line.
    for chatty in ("atroposlib", "httpx"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("atroposlib.envs.base").setLevel(logging.WARNING)
    try:
        ArithmeticEnvironment.cli()
    except PermissionError as error:
        sys.exit(f"the environment cannot start: {error}")


if __name__ == "__main__":
    main()

"""The arithmetic environment, sampling from a real embedded server through Atropos's own ManagedServer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import islice
from pathlib import Path

import pytest
from atroposlib.envs.base import APIServerConfig

from local_stack.arithmetic import Addition, training_order
from local_stack.environment import ArithmeticConfig, ArithmeticEnvironment
from schemas import ScoredGroup
from tests.conftest import RunningInferenceServer

MakeEnvironment = Callable[..., Awaitable[ArithmeticEnvironment]]


@pytest.fixture
async def make_environment(inference_server: RunningInferenceServer) -> AsyncIterator[MakeEnvironment]:
    """Make environments that sample from the tiny model; its config takes the given values."""
    made: list[ArithmeticEnvironment] = []

    async def make(url: str = inference_server.url, **values: object) -> ArithmeticEnvironment:
        directory = str(inference_server.model_directory)
        server = APIServerConfig(
            server_type="vllm",
            base_url=f"{url}/v1",
            model_name=inference_server.model_name,
            tokenizer_name=directory,
            api_key="unused",
            timeout=60,
        )
        config = ArithmeticConfig(tokenizer_name=directory, **values)
        made.append(ArithmeticEnvironment(config, [server]))
        return made[-1]

    yield make
    for environment in made:
        for server in environment.server.servers:
            await server.openai.close()
            if server.check_task is not None:
                server.check_task.cancel()
                await asyncio.gather(server.check_task, return_exceptions=True)


async def test_a_group_is_eight_replies_to_one_problem_that_the_trainer_accepts(
    make_environment: MakeEnvironment,
) -> None:
    environment = await make_environment()
    await environment.setup()
    item = await environment.get_next_item()
    group, backlog = await environment.collect_trajectories(item)
    assert backlog == []

    checked = ScoredGroup.model_validate_json(json.dumps(group))
    assert len(checked.tokens) == 8
    assert checked.generation_params == {"temperature": 1.0}
    assert checked.inference_logprobs is not None
    prompt = environment.tokenizer.apply_chat_template(
        [{"role": "user", "content": item.question}], tokenize=False, add_generation_prompt=True
    )
    for tokens, masks, logprobs, score in zip(
        checked.tokens, checked.masks, checked.inference_logprobs, checked.scores, strict=True
    ):
        sampled = [token for token in masks if token != -100]
        assert 1 <= len(sampled) <= 16
        assert masks == [-100] * (len(tokens) - len(sampled)) + tokens[-len(sampled) :]
        assert environment.tokenizer.decode(tokens[: -len(sampled)]) == prompt
        assert logprobs[: -len(sampled)] == [1.0] * (len(tokens) - len(sampled))
        assert all(logprob < 0 for logprob in logprobs[-len(sampled) :])
        assert score == item.score(environment.tokenizer.decode(sampled, skip_special_tokens=True))
    assert len({tuple(tokens) for tokens in checked.tokens}) > 1


async def test_problems_come_in_the_order_of_the_seed(make_environment: MakeEnvironment) -> None:
    environment = await make_environment(seed=7)
    await environment.setup()
    items = [await environment.get_next_item() for _ in range(20)]
    assert items == list(islice(training_order(7), 20))
    assert all(isinstance(item, Addition) for item in items)


async def test_an_evaluation_writes_the_share_of_right_replies_to_the_held_out_problems(
    make_environment: MakeEnvironment, tmp_path: Path
) -> None:
    environment = await make_environment(data_dir_to_save_evals=str(tmp_path), evaluation_samples=2)
    await environment.evaluate()
    metrics = json.loads((tmp_path / "metrics.json").read_text())["results"]["all"]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert metrics["replies"] == len(samples) == 96
    assert len({sample["question"] for sample in samples}) == 48
    assert metrics["accuracy"] == sum(sample["score"] == 1.0 for sample in samples) / 96


@pytest.mark.parametrize("wanted", [True, False])
async def test_the_untrained_model_is_measured_before_the_first_rollout_if_asked_for(
    make_environment: MakeEnvironment, tmp_path: Path, wanted: bool
) -> None:
    environment = await make_environment(
        data_dir_to_save_evals=str(tmp_path), evaluation_samples=1, evaluate_before_training=wanted
    )
    await environment.setup()
    assert (tmp_path / "metrics.json").exists() == wanted


async def test_an_inference_server_that_never_answers_is_named(
    make_environment: MakeEnvironment, free_port: int
) -> None:
    environment = await make_environment(url=f"http://127.0.0.1:{free_port}", ready_timeout=0.5)
    with pytest.raises(
        TimeoutError, match=rf"no inference server answered at http://127.0.0.1:{free_port}/health"
    ):
        await environment.setup()

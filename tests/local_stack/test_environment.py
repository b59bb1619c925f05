"""The arithmetic environment, sampling from a real embedded server through Atropos's own ManagedServer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
from atroposlib.envs.base import APIServerConfig

from atropos_client import AtroposClient
from local_stack.arithmetic import Addition, training_order
from local_stack.environment import ArithmeticConfig, ArithmeticEnvironment
from schemas import ScoredGroup
from tests.atropos_client.test_real_api import REGISTRATION, RealApi
from tests.conftest import RunningInferenceServer, running_server

MakeEnvironment = Callable[..., Awaitable[ArithmeticEnvironment]]


def start_training(url: str) -> None:
    """Do what a trainer does before environments may register."""
    with AtroposClient(url) as trainer:
        trainer.register(REGISTRATION.model_copy(update={"batch_size": 16}))
        trainer.fetch_batch()


@pytest.fixture(scope="module")
def inference_server(tiny_model_directory: Path) -> Iterator[RunningInferenceServer]:
    """One server for all of these tests; what one does to its label is nothing to the others."""
    with running_server(tiny_model_directory) as server:
        yield server


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
    environment = await make_environment(on_policy=False)  # no trainer comes that would name a version
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


class AllSame(Addition):
    """A problem to which every reply is right."""

    def score(self, reply: str) -> float:
        return 1.0


class OneRight(Addition):
    """A problem to which one reply of a group is right."""

    scores = iter([1.0] + [0.0] * 7)

    def score(self, reply: str) -> float:
        return next(self.scores)


async def test_a_version_without_anything_to_learn_from_is_sampled_again_at_once(
    make_environment: MakeEnvironment, inference_server: RunningInferenceServer
) -> None:
    with RealApi() as api:
        await asyncio.to_thread(start_training, api.url)
        environment = await make_environment(rollout_server_url=api.url, batch_size=16)  # two groups
        await environment.setup()
        await environment.register_env()
        await environment.get_server_info()
        inference_server.post("/update_weight_version", {"new_version": "0"})

        async def roll_out(item: Addition, *, seconds: float = 30) -> None:
            environment.running_items[item] = {"item": item}
            await asyncio.wait_for(environment.handle_env(item), seconds)

        for item in (AllSame(1, 1), AllSame(1, 2), AllSame(1, 3), OneRight(1, 4)):
            await roll_out(item)
        with pytest.raises(TimeoutError):  # the last batch has one group to learn from
            await roll_out(AllSame(1, 5), seconds=2)
        await environment.get_status()
        assert environment.status_dict["queue_size"] == 4


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


async def test_a_restarted_environment_keeps_the_score_of_the_untrained_model(
    make_environment: MakeEnvironment, tmp_path: Path
) -> None:
    (tmp_path / "metrics.json").write_text("earlier")
    environment = await make_environment(data_dir_to_save_evals=str(tmp_path), evaluate_before_training=True)
    await environment.setup()
    assert (tmp_path / "metrics.json").read_text() == "earlier"


@pytest.mark.slow
async def test_an_environment_registers_again_where_the_api_was_restarted(
    make_environment: MakeEnvironment, caplog: pytest.LogCaptureFixture
) -> None:
    with RealApi() as api:
        await asyncio.to_thread(start_training, api.url)
        environment = await make_environment(rollout_server_url=api.url)
        await environment.setup()
        await environment.register_env()
        await environment.get_status()
        api.kill()
        asking = asyncio.create_task(environment.get_status())
        while "does not answer" not in caplog.text:
            await asyncio.sleep(0.1)
        await asyncio.to_thread(api.start)
        while "registering again" not in caplog.text:
            await asyncio.sleep(0.1)
        await asyncio.to_thread(start_training, api.url)
        await asking
        assert environment.status_dict["queue_size"] == 0
        assert environment.config.batch_size == 16


async def test_an_inference_server_that_never_answers_is_named(
    make_environment: MakeEnvironment, free_port: int
) -> None:
    environment = await make_environment(url=f"http://127.0.0.1:{free_port}", ready_timeout=0.5)
    with pytest.raises(
        TimeoutError, match=rf"no inference server answered at http://127.0.0.1:{free_port}/health"
    ):
        await environment.setup()

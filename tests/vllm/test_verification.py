"""What verification finds at a real vLLM: old cache blocks, a broken tensor, the kind of its log-probs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from tests.trainer.publishing import ModelRun
from tests.trainer.test_cli import atropos_train
from tests.vllm.conftest import StartVllm
from tests.vllm.launching import VllmServer
from trainer.publish import (
    Comparison,
    LogprobKind,
    LogprobPolicy,
    Publisher,
    Verdict,
    VerificationFailed,
    VllmRoutes,
)
from trainer.publish.interfaces import NextToken

WORKER = ("--worker-cls", "atropos_cpu_worker.AtroposCPUWorker")
"""Without it, stock vLLM on the CPU keeps the output layer of a tied model: a broken tensor by itself."""


@pytest.fixture(scope="module")
def server(vllm_model_directory: Path, start_vllm: StartVllm) -> VllmServer:
    """Tells what comes from the prefix cache; gives raw log-probs, as is vLLM's default."""
    return start_vllm(vllm_model_directory, flags=[*WORKER, "--enable-prompt-tokens-details"])


@pytest.fixture
def run(server: VllmServer, tmp_path: Path) -> ModelRun:
    return ModelRun(server.model, server.url, tmp_path / "published")


class KeepsItsCache(VllmRoutes):
    """A server that says it has emptied its prefix cache, and has not: neither when paused nor when asked."""

    def pause(self) -> None:
        httpx.post(
            f"{self.url}/pause", params={"mode": "keep", "clear_cache": "false"}, timeout=60
        ).raise_for_status()

    def reset_caches(self) -> None:
        pass


class DoesNotTell(KeepsItsCache):
    """The same, started without `--enable-prompt-tokens-details`."""

    def next_token(self, *arguments: Any, **options: Any) -> NextToken:
        said = super().next_token(*arguments, **options)
        return NextToken(logprobs=said.logprobs)


def settle(run: ModelRun) -> None:
    """Bring the server to this run's weights, whatever the test before left there."""
    with run.publishing() as publisher:
        publisher.start(0)


def failure(publisher: Publisher, version: int) -> Comparison:
    with pytest.raises(VerificationFailed) as caught:
        publisher.publish(version)
    assert caught.value.comparison is not None
    return caught.value.comparison


def test_float32_is_told_apart_down_to_small_steps_and_its_noise_is_a_hundredth_of_the_tolerance(
    run: ModelRun,
) -> None:
    with run.publishing() as publisher:
        publisher.start(0)
        for version, size in ((1, 1e-3), (2, 1e-4), (3, 1e-5)):
            run.train(size)
            comparison = publisher.publish(version).servers[0].comparison
            assert comparison is not None
            assert comparison.mean_difference < 0.01 * comparison.tolerance
            assert comparison.next_mean_difference is not None
            assert comparison.next_mean_difference < 0.01 * comparison.tolerance
            assert comparison.distinguishable
            assert comparison.cached_tokens == 0
            assert comparison.logprob_kind is LogprobKind.RAW


def test_blocks_of_old_weights_are_found_by_the_servers_own_count(run: ModelRun) -> None:
    settle(run)
    with run.publishing(KeepsItsCache) as publisher:
        assert publisher.start(0).already_served
        comparison = failure(publisher, 1)  # even though the weights are the same
    assert comparison.verdict is Verdict.STALE_CACHE
    assert comparison.cached_tokens == 128


def test_blocks_of_old_weights_are_found_in_the_numbers_where_nothing_is_counted(run: ModelRun) -> None:
    settle(run)
    with run.publishing(DoesNotTell) as publisher:
        assert publisher.start(0).already_served
        run.train(1e-2)
        comparison = failure(publisher, 1)
    assert comparison.verdict is Verdict.STALE_CACHE
    assert comparison.cached_tokens is None
    assert (
        comparison.mean_difference < 0.01 * comparison.tolerance
    )  # what is scored around the cache is right


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("model.layers.1.self_attn.v_proj.weight", torch.zeros_like),
        ("model.layers.1.mlp.down_proj.weight", lambda weight: weight.t().reshape(weight.shape)),
        ("model.embed_tokens.weight", lambda weight: weight.flip(0)),
    ],
)
def test_one_broken_tensor_among_fresh_ones_is_found(
    name: str, broken: Callable[[Tensor], Tensor], run: ModelRun
) -> None:
    with run.publishing() as publisher:
        publisher.start(0)
        run.train(1e-4)
        run.sent = {name: broken(run.model.state_dict()[name])}
        assert failure(publisher, 1).verdict in (Verdict.OVER_TOLERANCE, Verdict.STALE)
        run.sent = {}
        assert publisher.publish(2).verified


def test_the_self_test_passes_and_says_what_kind_of_server_it_is(server: VllmServer, tmp_path: Path) -> None:
    done = atropos_train(
        "check",
        "--publish",
        *("--model.path", str(server.model), "--train.device", "cpu"),
        *("--publish.transport", "disk", "--publish.servers", server.url),
        *("--train.output_dir", str(tmp_path / "run")),
    )
    assert "failed   publish self-test" not in done.stdout, done.stdout + done.stderr
    assert "version 0 published 2 times" in done.stdout
    assert "did not move at all" in done.stdout
    assert "its log-probs are raw" in done.stdout
    assert "tells how much of a prompt comes from the prefix cache" in done.stdout
    assert server.get("/is_paused").json() == {"is_paused": False}


def test_bfloat16_raises_no_false_alarm_and_processed_log_probs_are_scaled(
    vllm_model_directory: Path, start_vllm: StartVllm, tmp_path: Path
) -> None:
    server = start_vllm(
        vllm_model_directory, dtype="bfloat16", flags=[*WORKER, "--logprobs-mode", "processed_logprobs"]
    )
    run = ModelRun(server.model, server.url, tmp_path / "published")
    policy = LogprobPolicy(required="scaled", fitting=LogprobKind.SCALED)
    with run.publishing(logprobs=policy, dtype=torch.bfloat16) as publisher:
        publisher.start(0)
        for version in range(1, 9):
            run.train(1e-3)
            comparison = publisher.publish(version).servers[0].comparison
            assert comparison is not None
            assert comparison.matches
            assert comparison.logprob_kind is LogprobKind.SCALED
        name = "model.layers.1.self_attn.v_proj.weight"
        run.sent = {name: torch.zeros_like(run.model.state_dict()[name])}
        assert not failure(publisher, 9).matches

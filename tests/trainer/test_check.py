"""`atropos-train check` against nothing, and against a real API and inference server."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from atropos_client import AtroposClient
from local_stack.inference import Engine
from local_stack.inference.weights import read_checkpoint
from schemas import ScoredGroup
from tests.atropos_client.environment_side import push_groups, register_environment
from tests.atropos_client.test_real_api import RealApi
from tests.conftest import RunningInferenceServer
from tests.forked import forked_ranks
from tests.trainer.test_cli import atropos_train
from trainer import load_config
from trainer.check._api import check_api
from trainer.sources.live import make_registration


class RoundingEngine(Engine):
    """Rounds the weights that it is sent to bfloat16."""

    async def reload_weights(self, directory: Path) -> None:
        """Load them rounded."""
        rounded = {name: tensor.bfloat16().float() for name, tensor in read_checkpoint(directory).items()}
        await self.fill(rounded)


@pytest.fixture
def api_url() -> Iterator[str]:
    """The real API server, in a process of its own."""
    with RealApi() as api:
        yield api.url


def test_every_party_that_is_missing_is_named_with_a_remedy(tmp_path: Path, free_port: int) -> None:
    nowhere = f"http://127.0.0.1:{free_port}"
    done = atropos_train(
        "check",
        *("--model.path", str(tmp_path / "nothing")),
        *("--atropos.url", nowhere),
        *("--publish.transport", "disk", "--publish.servers", nowhere),
        *("--train.output_dir", str(tmp_path / "run")),
        HF_HUB_OFFLINE="1",
    )
    assert done.returncode == 1
    for party in (
        "failed   model",
        "failed   Atropos API",
        f"failed   inference {nowhere}",
        "ok       output",
    ):
        assert party in done.stdout
    assert done.stdout.count("->") >= 3
    assert "Traceback" not in done.stdout + done.stderr


def test_all_processes_that_a_launcher_started_are_counted_and_one_of_them_speaks(
    tmp_path: Path, free_port: int
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    words = ["check", "--model.path", tmp_path / "nothing", "--train.device", "cpu"]
    words += ["--parallel.mode", "sharded", "--train.output_dir", tmp_path / "run"]
    words += ["--atropos.url", "http://127.0.0.1:9"]
    ranks = forked_ranks(2, free_port, "trainer.cli", words, stdout=out, stderr=log)
    try:
        assert [rank.wait(120) for rank in ranks] == [1, 0], log.read_text()
    finally:
        for rank in ranks:
            rank.kill()
    assert out.read_text().count("processes: 2 processes on 1 node, sharded would train, on cpu") == 1


@pytest.mark.slow
def test_a_whole_stack_passes_and_environments_may_come_later(
    api_url: str, inference_server: object, tiny_model_directory: Path, tmp_path: Path
) -> None:
    done = atropos_train(
        "check",
        *("--model.path", str(tiny_model_directory)),
        *("--atropos.url", api_url, "--atropos.max_token_length", "256"),
        *("--publish.transport", "disk", "--publish.servers", str(inference_server.url)),  # type: ignore[attr-defined]
        *("--train.output_dir", str(tmp_path / "run")),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "A run can start." in done.stdout
    assert "warning  environments: none has registered" in done.stdout
    assert "has every route that publishing needs" in done.stdout
    assert "tokenizes as the trainer does" in done.stdout


@pytest.mark.slow
def test_environments_are_asked_for_and_groups_that_never_fill_a_batch_fail(api_url: str) -> None:
    config = load_config(
        None, ["--model.path", "m", "--atropos.url", api_url, "--atropos.batch_size", "8"], environment={}
    )
    with AtroposClient(api_url) as client:
        client.register(make_registration(config, 0))
        client.fetch_batch()  # before it, environments have to wait
        assert register_environment(api_url, group_size=3)["env_id"] == 0
        quiet = check_api(config)[-1]
        threes = ScoredGroup(tokens=[[1, 2]] * 3, masks=[[-100, 2]] * 3, scores=[1, 0, 0], env_id=0)
        push_groups(api_url, [threes])
        misfit = check_api(config)[-1]
    assert (quiet.status, quiet.found) == ("warning", "1 registered, none has sent a group yet")
    assert (misfit.status, misfit.found) == (
        "failed",
        "groups of 3 sequences never make a batch of exactly 8",
    )
    assert "set atropos.batch_size to a multiple of 3" in (misfit.remedy or "")


@pytest.mark.parametrize("asked_for", [False, True])
def test_environments_keep_no_checkpoints_unless_asked_for_and_never_end_by_themselves(
    asked_for: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--atropos.environment_checkpoint_dir", "of/environments"] if asked_for else []
    found = make_registration(load_config(None, ["--model.path", "m", *words], environment={}), 5)
    expected = (str(tmp_path / "of/environments"), 50) if asked_for else ("", -1)
    assert (found.checkpoint_dir, found.save_checkpoint_interval) == expected
    assert found.num_steps == 2**31 - 1  # atroposlib refuses -1


def check_publish(
    server: RunningInferenceServer, output: Path, *words: str
) -> subprocess.CompletedProcess[str]:
    return atropos_train(
        "check",
        "--publish",
        *("--model.path", str(server.model_directory)),
        *("--atropos.max_token_length", "256"),
        *("--publish.transport", "disk", "--publish.servers", server.url),
        *("--train.output_dir", str(output), "--train.device", "cpu"),
        *words,
    )


@pytest.mark.slow
def test_publishing_unchanged_weights_changes_nothing_and_leaves_nothing_behind(
    inference_server: RunningInferenceServer, tmp_path: Path
) -> None:
    done = check_publish(inference_server, tmp_path / "run")
    lines = [line for line in done.stdout.splitlines() if "publish self-test" in line]
    assert "failed   publish self-test" not in done.stdout, done.stdout + done.stderr
    assert "version 0 published 2 times" in lines[0]
    assert "did not move at all" in lines[1]
    assert "at temperatures other than 1 its log-probs are raw" in lines[2]
    assert "does not tell how much of a prompt comes from the prefix cache" in lines[3]
    assert not inference_server.client.get("/is_paused").json()["is_paused"]
    assert list((tmp_path / "run" / "published").iterdir()) == []


@pytest.mark.slow
def test_a_server_of_another_precision_fails_the_self_test_with_the_reason(
    start_inference_server: Callable[..., RunningInferenceServer], tiny_model_directory: Path, tmp_path: Path
) -> None:
    server = start_inference_server(tiny_model_directory, engine_class=RoundingEngine)
    done = check_publish(server, tmp_path / "run", "--publish.dtype", "float32")
    assert done.returncode == 1
    assert "failed   publish self-test" in done.stdout
    assert "unchanged weights were sent, and it does not serve them: over tolerance" in done.stdout
    assert "set publish.dtype or publish.tolerance accordingly" in done.stdout
    assert not server.client.get("/is_paused").json()["is_paused"]

"""Publishing a tiny real model to the real embedded server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from local_stack.models import make_tiny_model
from tests.conftest import RunningInferenceServer
from tests.trainer.publishing import ModelRun
from trainer.publish import Publisher, ServerFailure, Verdict, VerificationFailed

pytestmark = pytest.mark.slow


@pytest.fixture
def server(inference_server: RunningInferenceServer) -> RunningInferenceServer:
    return inference_server


@pytest.fixture
def run(server: RunningInferenceServer, tmp_path: Path) -> ModelRun:
    return ModelRun(server.model_directory, server.url, tmp_path / "published")


@pytest.fixture
def publisher(run: ModelRun) -> Iterator[Publisher]:
    with run.publishing() as publisher:
        yield publisher


def served_logprobs(server: RunningInferenceServer) -> list[float]:
    (choice,) = server.complete([5, 50, 100, 150], max_tokens=1, prompt_logprobs=0)
    return [next(iter(entry.values()))["logprob"] for entry in choice["prompt_logprobs"][1:]]


def test_publishing_changes_what_is_served_and_proves_it(
    run: ModelRun, publisher: Publisher, server: RunningInferenceServer
) -> None:
    report = publisher.start(0)
    assert report.already_served
    assert report.servers[0].comparison is not None
    assert report.servers[0].comparison.mean_difference < 1e-5
    served = [served_logprobs(server)]
    for version, size in ((1, 1e-2), (2, 1e-5), (3, 0.0)):
        run.train(size)
        report = publisher.publish(version)
        comparison = report.servers[0].comparison
        assert comparison is not None
        assert comparison.verdict is Verdict.MATCH
        assert comparison.mean_difference < 1e-5
        assert comparison.distinguishable is (size > 0)
        assert publisher.served_version == version
        served.append(served_logprobs(server))
    assert served[0] != served[1] != served[2] == served[3]
    assert sorted(path.name for path in run.directory.iterdir()) == ["v000002", "v000003"]
    assert server.client.get("/weight_info").json() == {"weight_version": "3"}
    assert server.client.get("/is_paused").json() == {"is_paused": False}


def test_old_weights_under_a_new_version_are_caught_even_after_a_tiny_step(
    run: ModelRun, publisher: Publisher, server: RunningInferenceServer, tiny_model_directory: Path
) -> None:
    publisher.start(0)
    run.train(1e-6)
    run.write = partial(shutil.copytree, tiny_model_directory)
    with pytest.raises(VerificationFailed) as caught:
        publisher.publish(1)
    comparison = caught.value.comparison
    assert comparison is not None
    assert comparison.verdict is Verdict.STALE
    assert comparison.mean_difference < comparison.tolerance
    assert publisher.served_version == 0
    assert server.client.get("/weight_info").json() == {"weight_version": "1"}, "and it is not believed"
    assert server.client.get("/is_paused").json() == {"is_paused": False}


def test_weights_of_another_shape_are_refused_by_the_server_and_it_goes_on_serving(
    run: ModelRun, publisher: Publisher, server: RunningInferenceServer, tmp_path: Path
) -> None:
    publisher.start(0)
    before = served_logprobs(server)
    other = make_tiny_model(tmp_path / "other", hidden_size=32)
    run.write = partial(shutil.copytree, other)
    with pytest.raises(ServerFailure, match=r"load failed.*shape"):
        publisher.publish(1)
    assert served_logprobs(server) == before

"""Publishing to the real embedded server, in its own process, with a tiny real model."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from local_stack.models import make_tiny_model
from trainer.config import PublishSettings
from trainer.export.hf_model import capture_model
from trainer.model.base_checkpoint import read_base
from trainer.model.weight_stream import WeightStream
from trainer.publish import (
    DiskTransport,
    Publisher,
    ServerFailure,
    Verdict,
    VerificationFailed,
    VllmRoutes,
    make_probes,
    score_probes,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server_url(tiny_model_directory: Path) -> Iterator[str]:
    """One server for all tests."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "local_stack.inference", "--model", str(tiny_model_directory)]
    with subprocess.Popen([*command, "--served-model-name", "policy", "--port", str(port)]) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


class Run:
    """A model, its tokenizer and a publisher, as a trainer holds them."""

    def __init__(self, model_directory: Path, url: str, directory: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(model_directory)
        tokenizer = AutoTokenizer.from_pretrained(model_directory)
        self.url = url
        self.directory = directory
        self.base = read_base(str(model_directory))
        self.capture: Callable[[], Callable[[Path], object]] = self.copy_weights
        settings = PublishSettings(transport="disk", servers=[url], keep=2, on_failure="abort")
        routes = VllmRoutes(url, settings)
        routes.wait_until_ready()
        routes.load_directory(model_directory, 0)  # whatever the test before has left there
        self.publisher = Publisher(
            settings,
            transport=DiskTransport(directory, lambda: self.capture(), keep=2),
            servers=[routes],
            probes=make_probes(tokenizer),
            score=partial(score_probes, self.model, device="cpu"),
        )

    def copy_weights(self) -> Callable[[Path], None]:
        return capture_model(WeightStream(self.model, self.base))

    def train(self, size: float) -> None:
        """Change every weight a little."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += size * torch.randn_like(parameter)

    def served_logprobs(self) -> list[float]:
        body = {"model": "policy", "prompt": [[5, 50, 100, 150]], "max_tokens": 1, "prompt_logprobs": 0}
        reply = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60).raise_for_status().json()
        return [next(iter(entry.values()))["logprob"] for entry in reply["choices"][0]["prompt_logprobs"][1:]]


@pytest.fixture
def run(tiny_model_directory: Path, server_url: str, tmp_path: Path) -> Iterator[Run]:
    torch.manual_seed(0)
    run = Run(tiny_model_directory, server_url, tmp_path / "published")
    with run.publisher:
        yield run


def test_publishing_changes_what_is_served_and_proves_it(run: Run) -> None:
    report = run.publisher.start(0)
    assert report.already_served
    assert report.servers[0].comparison is not None
    assert report.servers[0].comparison.mean_difference < 1e-5
    served = [run.served_logprobs()]
    for version, size in ((1, 1e-2), (2, 1e-5), (3, 0.0)):
        run.train(size)
        report = run.publisher.publish(version)
        comparison = report.servers[0].comparison
        assert comparison is not None
        assert comparison.verdict is Verdict.MATCH
        assert comparison.mean_difference < 1e-5
        assert comparison.distinguishable is (size > 0)
        assert run.publisher.served_version == version
        served.append(run.served_logprobs())
    assert served[0] != served[1] != served[2] == served[3]
    assert sorted(path.name for path in run.directory.iterdir()) == ["v000002", "v000003"]
    assert httpx.get(f"{run.url}/weight_info").json() == {"weight_version": "3"}
    assert httpx.get(f"{run.url}/is_paused").json() == {"is_paused": False}


def test_old_weights_under_a_new_version_are_caught_even_after_a_tiny_step(
    run: Run, tiny_model_directory: Path
) -> None:
    run.publisher.start(0)
    run.train(1e-6)
    run.capture = lambda: partial(shutil.copytree, tiny_model_directory)
    with pytest.raises(VerificationFailed) as caught:
        run.publisher.publish(1)
    comparison = caught.value.comparison
    assert comparison is not None
    assert comparison.verdict is Verdict.STALE
    assert comparison.mean_difference < comparison.tolerance
    assert run.publisher.served_version == 0
    assert httpx.get(f"{run.url}/weight_info").json() == {"weight_version": "1"}, "and it is not believed"
    assert httpx.get(f"{run.url}/is_paused").json() == {"is_paused": False}


def test_weights_of_another_shape_are_refused_by_the_server_and_it_goes_on_serving(
    run: Run, tmp_path: Path
) -> None:
    run.publisher.start(0)
    before = run.served_logprobs()
    other = make_tiny_model(tmp_path / "other", hidden_size=32)
    run.capture = lambda: partial(shutil.copytree, other)
    with pytest.raises(ServerFailure, match=r"load failed.*shape"):
        run.publisher.publish(1)
    assert run.served_logprobs() == before

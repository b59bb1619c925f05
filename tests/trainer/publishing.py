"""Publishers for tests: of a stand-in policy, and of real models; the fixtures are in `conftest`."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer.inference_stand_in import PROBES, Policy, StandIn
from trainer.config import PublishSettings
from trainer.export.hf_model import capture_model
from trainer.export.peft_adapter import capture_adapter
from trainer.model.base_checkpoint import read_base
from trainer.model.weight_stream import WeightStream
from trainer.publish import (
    DiskTransport,
    InferenceServer,
    LogprobPolicy,
    LoraTransport,
    Probes,
    Publisher,
    SglangRoutes,
    VllmRoutes,
    make_probes,
    score_probes,
)


def settings_for(*servers: StandIn, **options: Any) -> PublishSettings:
    """Over a directory; the first failure ends it, and nobody looks after the servers in between."""
    defaults = {
        "transport": "disk",
        "servers": [server.url for server in servers],
        "on_failure": "abort",
        "watch_interval": 60.0,
    }
    return PublishSettings(**(defaults | options))


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for something; the bound only ends a hang."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@contextmanager
def publishing(
    policy: Policy,
    directory: Path,
    *servers: StandIn,
    probes: Probes = PROBES,
    served_model_name: str | None = None,
    logprobs: LogprobPolicy | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    **options: Any,
) -> Iterator[Publisher]:
    settings = settings_for(*servers, **options)

    def routes(url: str) -> InferenceServer:
        if settings.engine == "sglang":
            return SglangRoutes(url, settings)
        return VllmRoutes(url, settings, served_model_name=served_model_name)

    with Publisher(
        settings,
        transport=DiskTransport(directory, lambda: policy.capture(), keep=settings.keep),
        servers=[routes(url) for url in settings.servers],
        probes=probes,
        score=lambda asked: policy.score(asked),
        logprobs=logprobs,
        stop_requested=stop_requested,
    ) as publisher:
        yield publisher


@contextmanager
def publishing_adapters(
    model: nn.Module, directory: Path, *urls: str, stream: WeightStream, probes: Probes, **options: Any
) -> Iterator[Publisher]:
    """Publish a model's adapter; merged weights, those of `stream`, to servers that take none."""
    settings = PublishSettings(
        **({"transport": "lora", "servers": list(urls), "on_failure": "abort"} | options)
    )
    with Publisher(
        settings,
        transport=LoraTransport(
            directory,
            lambda: capture_adapter(model),
            keep=settings.keep,
            merged=DiskTransport(directory, lambda: capture_model(stream), keep=settings.keep),
        ),
        servers=[VllmRoutes(url, settings) for url in urls],
        probes=probes,
        score=lambda asked: score_probes(model, asked, "cpu"),
    ) as publisher:
        yield publisher


class ModelRun:
    """A model that changes, as a trainer holds it, and is published to one server over a directory."""

    def __init__(self, model: Path, url: str, directory: Path) -> None:
        torch.manual_seed(0)
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.base = read_base(str(model))
        self.url = url
        self.directory = directory
        self.sent: dict[str, Tensor] = {}
        """What is published instead of the model's own tensors."""
        self.write: Callable[[Path], object] | None = None
        """Writes what is published instead of all that."""

    @contextmanager
    def publishing(
        self,
        routes: Callable[..., VllmRoutes] = VllmRoutes,
        *,
        logprobs: LogprobPolicy | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[Publisher]:
        settings = PublishSettings(transport="disk", servers=[self.url], on_failure="abort")

        def capture() -> Callable[[Path], object]:
            model = copy.deepcopy(self.model)
            model.load_state_dict(self.sent, strict=False)
            captured = capture_model(WeightStream(model, self.base.declaring(dtype), dtype=dtype))
            return self.write or captured

        with Publisher(
            settings,
            transport=DiskTransport(self.directory, capture, keep=2),
            servers=[routes(self.url, settings)],
            probes=make_probes(self.tokenizer, context=2048),
            score=lambda probes: score_probes(self.model, probes, "cpu"),
            logprobs=logprobs,
        ) as publisher:
            yield publisher

    def train(self, size: float) -> None:
        """Change every weight a little."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += size * torch.randn_like(parameter)

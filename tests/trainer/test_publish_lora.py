"""Publishing adapters: real PEFT models on both sides, HTTP between them, and a server that misbehaves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from schemas.inference import (
    CollectiveRpcRequest,
    CompletionRequest,
    CurrentAdapter,
    LoadAdapterRequest,
    UnloadAdapterRequest,
)
from tests.trainer.inference_stand_in import PROBES, Answer, StandIn, serving
from tests.trainer.models import change_adapter, stream_of, tiny_model, with_adapter
from tests.trainer.publishing import eventually, publishing_adapters
from trainer.config import PublishSettings, load_config
from trainer.errors import CheckpointError, ConfigurationError
from trainer.export.hf_model import capture_model
from trainer.export.peft_adapter import capture_adapter
from trainer.publish import (
    DiskTransport,
    LoraTransport,
    Publisher,
    ServerFailure,
    StagingFailed,
    Verdict,
    VerificationFailed,
    VllmRoutes,
    score_probes,
    score_with_model,
)

peft = pytest.importorskip("peft", reason="adapters need the optional peft")

METRICS = b"""# HELP vllm:lora_requests_info Running
vllm:lora_requests_info{max_lora="2",running_lora_adapters="",waiting_lora_adapters=""} 1.8e+09
vllm:lora_requests_info{running_lora_adapters="policy-00000000-v000009",waiting_lora_adapters=""} 1.7e+09
other 1.0
"""
"""Nobody is sampling any more; somebody was, a while ago."""


class AdapterStandIn(StandIn):
    """Loads real adapters and scores with them, under the routes of vLLM and of our middleware."""

    def __init__(self, base: nn.Module | None = None) -> None:
        super().__init__((0.0, 0.0))
        self.base: nn.Module = base or tiny_model("llama", dtype=torch.float32)
        self.adapters: dict[str, nn.Module] = {}
        self.paths_read: list[str] = []
        self.current = CurrentAdapter(name=None)
        self.lora: dict[str, int] | None = {"max_loras": 2, "max_lora_rank": 16}
        self.lacks: set[str] = set()
        """Routes that are not there."""
        self.reads: Callable[[str], str] = lambda path: path
        """Which directory it really reads."""

    def restart(self) -> None:
        self.adapters.clear()
        self.current = CurrentAdapter(name=None)
        self.label = "default"

    def sent(self) -> list[str]:
        """What it was told to do, in order: no questions."""
        return [call.removeprefix("POST ") for call in self.calls if call.startswith("POST ")]

    def answer(self, path: str, body: bytes) -> Answer:
        if path in self.lacks:
            return 404, {"detail": "Not Found"}
        match path:
            case "/v1/models":
                cards = [{"id": name, "parent": "policy"} for name in self.adapters]
                return 200, {"object": "list", "data": [{"id": "policy"}, *cards]}
            case "/server_info":
                return 200, {"vllm_config": {"lora_config": self.lora}}
            case "/metrics":
                return 200, METRICS
            case "/atropos/adapter":
                if body:
                    self.current = CurrentAdapter.model_validate_json(body)
                return 200, self.current.model_dump()
            case "/v1/load_lora_adapter":
                return self.load_adapter(body) if body else (405, {"detail": "Method Not Allowed"})
            case "/v1/unload_lora_adapter":
                known = self.adapters.pop(UnloadAdapterRequest.model_validate_json(body).lora_name, None)
                return (200, "Success") if known else (404, {"error": {"message": "cannot be found"}})
            case "/collective_rpc":
                directory = CollectiveRpcRequest.model_validate_json(body).kwargs["weights_path"]
                self.base = type(self.base).from_pretrained(directory)  # type: ignore[attr-defined]
                return 200, {"results": [None]}
        return super().answer(path, body)

    def load_adapter(self, body: bytes) -> Answer:
        request = LoadAdapterRequest.model_validate_json(body)
        if request.lora_name in self.adapters:
            return 400, {"error": {"message": f"{request.lora_name} has already been loaded"}}
        path = self.reads(request.lora_path)
        self.paths_read.append(path)
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(self.base), path)
        self.adapters[request.lora_name] = adapted
        return 200, "Success"

    def scored(self, request: CompletionRequest) -> list[list[float]]:
        assert request.model is not None
        prompts: Any = request.prompt
        return score_with_model(self.named(request.model), prompts, "cpu")

    def sample(self, prompt: list[int], temperature: float, model: str = "policy") -> tuple[list[float], int]:
        with torch.no_grad():
            logits = self.named(model)(input_ids=torch.tensor([prompt])).logits[0, -1]
        return torch.log_softmax(logits, -1).tolist(), 0

    def named(self, model: str) -> nn.Module:
        return self.base if model == "policy" else self.adapters[model]


@pytest.fixture
def stand_in() -> AdapterStandIn:
    return AdapterStandIn()


@pytest.fixture
def model() -> Any:
    return with_adapter()


def publishing(
    model: Any, directory: Path, *servers: AdapterStandIn, **options: Any
) -> AbstractContextManager[Publisher]:
    urls = [server.url for server in servers]
    return publishing_adapters(model, directory, *urls, stream=stream_of(model), probes=PROBES, **options)


@pytest.fixture
def publisher(
    model: Any, server: AdapterStandIn, tmp_path: Path, options: dict[str, Any]
) -> Iterator[Publisher]:
    """Has published version 0 to `server`, which has forgotten what it was asked."""
    with publishing(model, tmp_path, server, **options) as publisher:
        publisher.start(0)
        server.calls.clear()
        yield publisher


def directories(directory: Path) -> list[str]:
    """Versions on the disk, without the run's random part."""
    return sorted(entry.name.partition("-")[2] for entry in directory.iterdir())


# --- the directory --------------------------------------------------------------------------------


def test_the_directory_is_what_peft_writes_and_reads(model: Any, tmp_path: Path) -> None:
    change_adapter(model, 1)
    captured = capture_adapter(model)
    before = score_with_model(model, PROBES.texts, "cpu")
    model.save_pretrained(tmp_path / "theirs")
    change_adapter(model, 2)  # which what is captured does not follow
    captured.write(tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {file.name for file in (tmp_path / "ours").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama", dtype=torch.float32), tmp_path / "ours")
    assert score_with_model(loaded, PROBES.texts, "cpu") == before


def test_the_wrapper_of_a_compiled_model_is_stripped_and_the_type_is_cast(model: Any, tmp_path: Path) -> None:
    change_adapter(model, 1)
    plain = capture_adapter(model)
    wrapped = capture_adapter(torch.compile(model, backend="eager"), dtype=torch.bfloat16)  # type: ignore[arg-type]
    assert wrapped.weights.keys() == plain.weights.keys()
    assert all(torch.equal(wrapped.weights[name], plain.weights[name].bfloat16()) for name in plain.weights)
    assert (plain.dtype, wrapped.dtype) == ("float32", "bfloat16")
    assert wrapped.weight_bytes * 2 == plain.weight_bytes


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"modules_to_save": ["o_proj"]},
        {"trainable_token_indices": [3]},
        {"init_lora_weights": "pissa"},
        {"layer_replication": [[0, 2], [1, 2]]},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_what_servers_do_not_load_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=f"{next(iter(options))}.*plain LoRA"):
        capture_adapter(with_adapter(**options))


def test_a_model_without_an_adapter_is_refused_before_any_server_is_touched(
    server: AdapterStandIn, tmp_path: Path
) -> None:
    with (
        publishing(tiny_model("llama", dtype=torch.float32), tmp_path, server) as publisher,
        pytest.raises(StagingFailed, match=r"model\.lora"),
    ):
        publisher.start(0)
    assert server.sent() == []


def test_the_configuration_refuses_adapters_that_are_not_trained() -> None:
    words = ["--publish.transport", "lora", "--publish.servers", "http://localhost:1", "--model.path", "m"]
    with pytest.raises(ConfigurationError, match=r"model\.lora is not set"):
        load_config(overrides=words, environment={})
    assert load_config(overrides=[*words, "--model.lora.rank", "4"], environment={}).model.lora is not None


# --- publishing -----------------------------------------------------------------------------------


def test_loads_proves_and_only_then_activates_without_a_pause(
    publisher: Publisher, model: Any, server: AdapterStandIn
) -> None:
    change_adapter(model, 1)
    report = publisher.publish(1)
    (name,) = [name for name in server.adapters if name.endswith("-v000001")]
    assert [path for path in server.sent() if path != "/v1/completions"] == [
        "/v1/load_lora_adapter",
        "/atropos/adapter",
        "/update_weight_version",
    ]
    assert server.sent().index("/v1/completions") < server.sent().index("/atropos/adapter")
    assert server.current == CurrentAdapter(name=name, weight_version="1")
    assert server.label == "1"
    assert report.pause_seconds == 0.0
    assert report.servers[0].comparison is not None
    assert report.servers[0].comparison.distinguishable
    assert report.weight_bytes == capture_adapter(model).weight_bytes


@pytest.mark.parametrize("options", [{"keep": 1}])
def test_somebody_elses_adapter_stays(publisher: Publisher, server: AdapterStandIn) -> None:
    server.adapters["policy-of-mine"] = server.base
    publisher.publish(1)
    assert set(server.adapters) == {"policy-of-mine", server.current.name}


@pytest.mark.parametrize("options", [{"keep": 1}])
def test_without_metrics_no_directory_that_was_loaded_is_deleted(
    publisher: Publisher, server: AdapterStandIn, tmp_path: Path
) -> None:
    server.lacks = {"/metrics"}
    for version in range(1, 4):
        publisher.publish(version)
    assert len(server.adapters) == 1
    assert directories(tmp_path) == ["v000000", "v000001", "v000002", "v000003"]


# --- failures -------------------------------------------------------------------------------------


def test_a_stale_adapter_under_the_new_name_is_caught_and_never_activated(
    publisher: Publisher, model: Any, server: AdapterStandIn
) -> None:
    change_adapter(model, 1)
    publisher.publish(1)
    current = server.current
    server.reads = lambda path: server.paths_read[-1]
    change_adapter(model, 2)
    with pytest.raises(VerificationFailed) as caught:
        publisher.publish(2)
    assert caught.value.comparison is not None
    assert caught.value.comparison.verdict is Verdict.STALE
    assert caught.value.comparison.cached_tokens is None, "nothing is emptied for an adapter"
    assert server.current == current


@pytest.mark.parametrize("options", [{"on_failure": "retry_until"}])
def test_a_failed_try_is_repeated_under_another_name(
    publisher: Publisher, model: Any, server: AdapterStandIn
) -> None:
    answers = iter([(500, {"error": "lost"})])
    server.faults["/v1/completions"] = lambda: next(answers, None)
    change_adapter(model, 1)
    assert publisher.publish(1).attempts == 2
    assert str(server.current.name).endswith("-v000001-2")
    # The first try is forgotten.
    assert [name.split("-", 2)[2] for name in server.adapters] == ["v000000", "v000001-2"]


def test_an_activation_that_did_not_happen_is_an_error(publisher: Publisher, server: AdapterStandIn) -> None:
    before = server.current
    server.faults["/atropos/adapter"] = (200, before.model_dump())
    with pytest.raises(ServerFailure, match=r"activate failed.*samples from"):
        publisher.publish(1)


@pytest.mark.parametrize("options", [{"keep": 1}])
def test_an_adapter_that_cannot_be_unloaded_costs_memory_only(
    publisher: Publisher, server: AdapterStandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults["/v1/unload_lora_adapter"] = (500, {"error": "busy"})
    publisher.publish(1)
    assert server.current.weight_version == "1"
    assert "an old adapter stays loaded" in caplog.text
    assert directories(tmp_path) == ["v000000", "v000001"]


@pytest.mark.parametrize("options", [{"watch_interval": 0.05}])
def test_a_server_that_was_restarted_gets_the_current_adapter_again(
    publisher: Publisher, model: Any, server: AdapterStandIn
) -> None:
    change_adapter(model, 1)
    publisher.publish(1)
    server.restart()
    eventually(lambda: server.current.weight_version == "1" and server.label == "1")
    assert server.current.name in server.adapters


@pytest.mark.parametrize("options", [{"watch_interval": 0.05}])
def test_an_adapter_that_somebody_switched_off_is_switched_on_again(
    publisher: Publisher, server: AdapterStandIn
) -> None:
    server.current = CurrentAdapter(name=None)
    eventually(lambda: server.current.name is not None)


def test_a_run_with_full_weights_takes_environments_back_from_an_adapter_to_the_model(
    server: AdapterStandIn, tmp_path: Path
) -> None:
    whole = tiny_model("llama", dtype=torch.float32)
    server.current = CurrentAdapter(name="policy-0000-v000007", weight_version="7")
    settings = PublishSettings(transport="disk", servers=[server.url])
    with Publisher(
        settings,
        transport=DiskTransport(tmp_path, lambda: capture_model(stream_of(whole)), keep=1),
        servers=[VllmRoutes(server.url, settings)],
        probes=PROBES,
        score=lambda probes: score_probes(whole, probes, "cpu"),
    ) as publisher:
        publisher.start(0)
        assert server.current.name is None
        assert server.sent().count("/atropos/adapter") == 1


# --- servers that take no adapters ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("lacking", "hint"),
    [
        ("/v1/load_lora_adapter", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        ("/atropos/adapter", "--middleware"),
        ("--enable-lora", "--enable-lora"),
    ],
)
def test_a_server_that_takes_no_adapters_is_told_what_it_lacks(
    lacking: str, hint: str, server: AdapterStandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_lack(server, lacking)
    with closing(routes_to(server)) as routes:
        assert not routes.takes_adapters()
        assert hint in caplog.text
        with pytest.raises(ServerFailure, match=r"connect failed.*publish\.lora_fallback is refuse"):
            LoraTransport(tmp_path, nothing, keep=2).connect(routes)


def test_a_server_that_takes_them_is_believed_and_one_at_a_time_is_warned_of(
    server: AdapterStandIn, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(routes_to(server)) as routes:
        assert routes.takes_adapters()
        assert caplog.text == ""
        server.lora = {"max_loras": 1}
        assert routes.takes_adapters()
        assert "--max-loras 2" in caplog.text
        server.lacks = {"/server_info"}  # outside of development mode
        assert routes.takes_adapters()


def nothing() -> Any:
    raise AssertionError("nothing is to be written")


def routes_to(server: AdapterStandIn) -> VllmRoutes:
    return VllmRoutes(server.url, PublishSettings(transport="lora", servers=[server.url]))


def test_each_server_gets_what_it_takes(model: Any, tmp_path: Path) -> None:
    taking, plain = AdapterStandIn(), AdapterStandIn()
    make_lack(plain, "--enable-lora")
    with serving(taking, plain), publishing(model, tmp_path, taking, plain) as publisher:
        publisher.start(0)
        change_adapter(model, 1)
        report = publisher.publish(1)
    assert all(outcome.comparison is not None for outcome in report.servers)
    assert [outcome.pause_seconds > 0 for outcome in report.servers] == [False, True]
    assert taking.current.weight_version == "1"
    assert plain.label == "1"
    assert plain.current.name is None


@pytest.mark.parametrize("options", [{"watch_interval": 0.05}])
def test_a_server_that_lost_its_ability_gets_merged_weights_from_the_next_version_on(
    publisher: Publisher, model: Any, server: AdapterStandIn
) -> None:
    make_lack(server, "--enable-lora")
    server.restart()
    # Asked for the second time since, so that the first answer has been taken to heart.
    eventually(lambda: server.calls.count("GET /server_info?config_format=json") > 2)
    change_adapter(model, 1)
    report = publisher.publish(1)
    assert report.servers[0].pause_seconds > 0
    assert server.label == "1"


def make_lack(server: AdapterStandIn, what: str) -> None:
    if what == "--enable-lora":
        server.lora = None
    else:
        server.lacks = {what}

"""Publishing to SGLang over a directory, against a stand-in: its routes, its pauses, its errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from schemas import sglang as wire
from tests.trainer.inference_stand_in import (
    BASE,
    STEP,
    VOCABULARY,
    Answer,
    Policy,
    StandIn,
    scores,
)
from tests.trainer.publishing import settings_for
from trainer.config import PublishSettings
from trainer.publish import (
    DiskTransport,
    LoraTransport,
    Phase,
    Probes,
    Publisher,
    ServerFailure,
    SglangRoutes,
    Verdict,
    VerificationFailed,
)
from trainer.publish.fleet import may_help

PROBES = Probes(
    texts=[list(range(7, 47)), [3, 1, 4, 1, 5, 96, 9, 2, 6]], passage=list(range(60)), cuts=(48, 60)
)
BODIES: dict[str, type[BaseModel]] = {
    "/pause_generation": wire.PauseRequest,
    "/continue_generation": wire.ContinueRequest,
    "/update_weight_version": wire.WeightVersionRequest,
    "/update_weights_from_disk": wire.DiskUpdateRequest,
    "/generate": wire.GenerateRequest,
}


class SglangStandIn(StandIn):
    """Answers SGLang's routes from two numbers, and refuses a field that SGLang does not have."""

    def __init__(self) -> None:
        super().__init__(BASE)
        self.bodies: dict[str, Any] = {}
        """The last body of each route."""
        self.info: dict[str, Any] = {}
        self.starting = False

    def answer(self, path: str, body: bytes) -> Answer:
        request: Any = None
        if path in BODIES:
            request = BODIES[path].model_validate_json(body)
            self.bodies[path] = json.loads(body)
        match path:
            case "/ready" | "/health":
                return (503 if self.paused or self.starting else 200), None
            case "/model_info":
                return 200, {"model_path": "somewhere", "weight_version": self.label}
            case "/server_info":
                return 200, self.info
            case "/pause_generation" | "/continue_generation":
                self.paused = path == "/pause_generation"
                return 200, {"status": "ok", "message": ""}
            case "/flush_cache":
                if not self.keeps_cache:
                    self.cache.clear()
                return 200, "Cache flushed."
            case "/update_weight_version":
                self.label = request.new_version
                return 200, {"success": True, "message": ""}
            case "/update_weights_from_disk":
                one, other = json.loads((Path(request.model_path) / "weights.json").read_text())
                self.weights = self.load(self.weights, (one, other))
                self.label = request.weight_version or self.label
                if request.flush_cache:
                    self.cache.clear()
                return 200, {"success": True, "message": ""}
            case "/generate" if request.logprob_start_len == 0:
                assert request.return_logprob
                rows = scores(self.weights, request.input_ids)
                return 200, [
                    _meta(input_token_logprobs=[[None, tokens[0], None], *_entries(row, tokens[1:])])
                    for tokens, row in zip(request.input_ids, rows, strict=True)
                ]
            case "/generate":
                return 200, self._sample(request)
        return 404, {"detail": "Not Found"}

    def _sample(self, request: wire.GenerateRequest) -> dict[str, Any]:
        prompt: Any = request.input_ids
        row, cached = self.sample(prompt, request.sampling_params.temperature or 1.0)
        likeliest = sorted(range(VOCABULARY), key=row.__getitem__, reverse=True)[: request.top_logprobs_num]
        told = _entries([row[token] for token in likeliest], likeliest)
        return _meta(output_token_logprobs=told[:1], output_top_logprobs=[told], cached_tokens=cached)


def _entries(row: list[float], tokens: list[int]) -> list[list[Any]]:
    return [[logprob, token, None] for logprob, token in zip(row, tokens, strict=True)]


def _meta(**told: Any) -> dict[str, Any]:
    return {"text": "", "output_ids": [1], "meta_info": {"id": "0", **told}}


@pytest.fixture
def stand_in() -> SglangStandIn:
    return SglangStandIn()


@pytest.fixture
def mode() -> str:
    return "keep"


@pytest.fixture
def options(mode: str) -> dict[str, Any]:
    return {"engine": "sglang", "probes": PROBES, "pause_mode": mode}


@pytest.fixture
def routes(server: SglangStandIn) -> Iterator[SglangRoutes]:
    routes = SglangRoutes(server.url, settings_for(server, engine="sglang"))
    yield routes
    routes.close()


@pytest.mark.parametrize(
    ("mode", "calls"),
    [
        ("keep", "pause_generation update_weights_from_disk flush_cache?timeout=0"),
        ("abort", "pause_generation update_weights_from_disk flush_cache?timeout=10"),
        ("wait", "update_weights_from_disk"),
    ],
)
def test_a_version_is_loaded_as_the_pause_mode_says_and_proven(
    publisher: Publisher, policy: Policy, server: SglangStandIn, tmp_path: Path, mode: str, calls: str
) -> None:
    assert publisher.take_reports()[0].already_served
    assert server.label == "0"
    policy.weights = STEP
    report = publisher.publish(1)
    asked = [call for call in server.calls if "/generate" not in call and "/model_info" not in call]
    assert asked == [f"POST /{call}" for call in f"{calls} update_weight_version continue_generation".split()]
    assert server.bodies["/update_weight_version"] == {"new_version": "1", "abort_all_requests": False}
    load = server.bodies["/update_weights_from_disk"]
    assert load["model_path"] == str(tmp_path / "v000001")
    assert load["flush_cache"] is (mode == "wait")
    assert "abort_all_requests" not in load
    if mode != "wait":
        assert server.bodies["/pause_generation"] == {"mode": "retract" if mode == "keep" else "abort"}
    assert (server.weights, server.label) == (STEP, "1")
    comparison = report.servers[0].comparison
    assert comparison is not None
    assert comparison.fraction == pytest.approx(1.0, abs=0.01)
    assert comparison.next_tokens >= 5 * len(PROBES.cuts)
    assert comparison.cached_tokens == 0


def test_blocks_that_old_weights_computed_are_found_by_its_own_count(
    publisher: Publisher, policy: Policy, server: SglangStandIn
) -> None:
    policy.weights = STEP
    server.keeps_cache = True
    with pytest.raises(VerificationFailed) as caught:
        publisher.publish(1)
    assert not server.paused, "it goes on all the same"
    assert caught.value.comparison is not None
    assert caught.value.comparison.verdict is Verdict.STALE_CACHE


# --- becoming ready -------------------------------------------------------------------------------


def test_a_server_that_a_dead_trainer_left_paused_is_resumed_before_it_is_asked_for_its_health(
    server: SglangStandIn, routes: SglangRoutes
) -> None:
    server.paused = True
    routes.wait_until_ready()
    paths = server.paths()
    assert paths.index("/continue_generation") < paths.index("/health")
    server.calls.clear()
    routes.wait_until_ready()
    assert "/continue_generation" not in server.paths(), "a server that is well is left alone"


def test_a_pause_shows(server: SglangStandIn, routes: SglangRoutes) -> None:
    assert not routes.is_paused()
    routes.pause()
    assert routes.is_paused()
    routes.resume()
    assert not routes.is_paused()
    server.faults["/ready"] = (404, {"detail": "Not Found"})
    assert not routes.is_paused()
    server.faults["/ready"] = (500, {"error": "broken"})
    with pytest.raises(ServerFailure, match=r"ready failed.*broken"):
        routes.is_paused()


def test_servers_that_cannot_be_published_to_are_refused_with_the_reason(
    server: SglangStandIn, routes: SglangRoutes
) -> None:
    server.info = {"tokenizer_worker_num": 4}
    with pytest.raises(ServerFailure, match=r"ready failed.*--tokenizer-worker-num 4"):
        routes.wait_until_ready()
    server.info = {"hicache_storage_backend": "file"}
    with pytest.raises(ServerFailure, match=r"ready failed.*--hicache-storage-backend file"):
        routes.wait_until_ready()
    server.faults["/model_info"] = (200, {"model_path": "m", "is_generation": False})
    with pytest.raises(ServerFailure, match=r"ready failed.*embeddings"):
        routes.wait_until_ready()
    server.faults["/model_info"] = (401, {"error": "Unauthorized"})
    with pytest.raises(ServerFailure, match=r"ready failed.*--admin-api-key") as caught:
        routes.wait_until_ready()
    assert not may_help([caught.value], verification_failures=0)


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_transports_that_are_vllms_are_refused_with_what_to_use(transport: Any) -> None:
    with pytest.raises(ValidationError, match=r"is for vLLM; with publish\.engine 'sglang' use 'disk'"):
        PublishSettings(transport=transport, engine="sglang", servers=["http://127.0.0.1:9001"])


def test_adapters_go_to_it_as_merged_weights_or_not_at_all(routes: SglangRoutes, tmp_path: Path) -> None:
    def nothing() -> Any:
        raise AssertionError

    with pytest.raises(ServerFailure, match=r"connect failed.*lora_fallback"):
        LoraTransport(tmp_path, nothing, keep=2).connect(routes)
    whole = DiskTransport(tmp_path / "whole", nothing, keep=2)
    assert LoraTransport(tmp_path, nothing, keep=2, merged=whole).connect(routes) is whole


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "phase", "fault"),
    [
        ("/pause_generation", Phase.PAUSE, "500"),
        ("/update_weights_from_disk", Phase.LOAD, "500"),
        ("/update_weights_from_disk", Phase.LOAD, "no success"),
        ("/flush_cache", Phase.RESET_CACHES, "500"),
        ("/update_weight_version", Phase.TAG, "no success"),
        ("/continue_generation", Phase.RESUME, "another program's"),
        ("/generate", Phase.VERIFY, "another program's"),
        ("/model_info", Phase.VERIFY, "500"),
    ],
)
def test_every_refusal_is_of_its_phase_and_the_server_is_resumed(
    path: str, phase: Phase, fault: str, publisher: Publisher, server: SglangStandIn
) -> None:
    answers: dict[str, Answer] = {
        "500": (500, "Internal Server Error"),
        "no success": (200, {"success": False, "message": "it went wrong"}),
        "another program's": (200, "<html>a proxy</html>"),
    }
    server.faults[path] = answers[fault]
    with pytest.raises(ServerFailure, match=path) as caught:
        publisher.publish(1)
    assert caught.value.phase is phase
    assert "/continue_generation" in server.paths()


def test_work_that_went_wrong_is_tried_again_and_a_request_that_is_not_understood_is_not(
    server: SglangStandIn, routes: SglangRoutes
) -> None:
    server.faults["/flush_cache"] = (400, "Flush cache failed.\n")
    with pytest.raises(ServerFailure, match=r"reset caches failed.*Flush cache failed\.") as caught:
        routes.reset_caches()
    assert may_help([caught.value], verification_failures=0)
    for reply, again in (
        ({"success": False, "message": "Failed to get weights iterator"}, True),
        ({"object": "error", "message": "Field required", "code": 400}, False),
    ):
        server.faults["/update_weights_from_disk"] = lambda reply=reply: (400, reply)
        with pytest.raises(ServerFailure, match="load failed") as refused:
            routes.load_directory(Path("/nowhere"), 1)
        assert may_help([refused.value], verification_failures=0) is again


def test_what_to_do_about_a_server_that_stays_paused_is_in_sglangs_words(
    server: SglangStandIn, routes: SglangRoutes
) -> None:
    server.faults["/continue_generation"] = (500, "broken")
    with pytest.raises(ServerFailure, match=r"resume failed.*POST /continue_generation"):
        routes.resume()


def test_a_server_without_labels_is_no_failure(server: SglangStandIn, routes: SglangRoutes) -> None:
    server.faults["/update_weight_version"] = (404, {"detail": "Not Found"})
    routes.tag(3)
    server.faults["/model_info"] = (200, {"model_path": "somewhere"})
    assert routes.weight_version() is None


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        (None, "no input_token_logprobs"),
        ([[None, 7, None], [-1.0, 8, None]], "2 log-probs for prompt 0 of 3"),
        ([[None, 7, None], [-1.0, 6, None], [-2.0, 9, None]], "token 6 at 1"),
        ([[None, 7, None], [None, 8, None], [-2.0, 9, None]], "None for token 8"),
        ([[None, 7, None], [-1.0], [-2.0, 9, None]], "Field required"),
    ],
)
def test_prompt_log_probs_that_speak_of_something_else_are_refused(
    server: SglangStandIn, routes: SglangRoutes, entries: Any, found: str
) -> None:
    server.faults["/generate"] = (200, [_meta(input_token_logprobs=entries)])
    with pytest.raises(ServerFailure, match=found):
        routes.score([[7, 8, 9]])


def test_ids_at_the_end_of_the_vocabulary_come_back_as_0_and_are_taken_by_their_place(
    server: SglangStandIn, routes: SglangRoutes
) -> None:
    entries = [[None, 7, None], [-1.0, 0, None], [-2.0, 9, None]]
    server.faults["/generate"] = (200, [_meta(input_token_logprobs=entries)])
    assert routes.score([[7, 8, 9]]) == [[-1.0, -2.0]]
    server.faults["/generate"] = (200, [])
    with pytest.raises(ServerFailure, match=r"verify failed.*0 replies for 1 prompts"):
        routes.score([[7, 8, 9]])


@pytest.mark.parametrize(
    ("sampled", "rivals", "found"),
    [
        (None, None, "0 log-probs of one generated token"),
        ([[None, 4, None]], None, "no log-prob for token 4"),
        ([[-0.5, 4, None]], [[[None, 9, None]]], "no log-prob for token 9"),
        ([[-0.5, 4, None]], [None], ""),
    ],
)
def test_generated_log_probs_that_are_missing_are_refused(
    server: SglangStandIn, routes: SglangRoutes, sampled: Any, rivals: Any, found: str
) -> None:
    reply = _meta(output_token_logprobs=sampled, output_top_logprobs=rivals)
    server.faults["/generate"] = (200, reply)
    if not found:
        assert routes.next_token([7, 8, 9]).logprobs == {4: -0.5}
        return
    with pytest.raises(ServerFailure, match=found):
        routes.next_token([7, 8, 9])


@pytest.mark.parametrize("kind", [*BODIES.values(), wire.SamplingParameters])
def test_a_misspelt_field_of_a_request_is_refused(kind: type[BaseModel]) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        kind.model_validate({"flush_cach": True})

"""Publishing to SGLang over a directory: its routes, its pauses, and every way in which it may misbehave."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from pydantic import ValidationError

from schemas import sglang as wire
from tests.trainer.models import tiny_model
from tests.trainer.sglang_stand_in import BODIES, SglangStandIn, serving
from trainer.config import PublishSettings
from trainer.model_directory import capture_model
from trainer.publish import (
    CacheResetFailed,
    ConnectFailed,
    DiskTransport,
    LoadFailed,
    LogprobPolicy,
    LoraTransport,
    PauseFailed,
    Phase,
    PhaseDeadlineExceeded,
    Probes,
    Publisher,
    PublishFailed,
    ResumeFailed,
    ScoringFailed,
    ServerFailure,
    ServerNotReady,
    StagedWeights,
    TagFailed,
    Verdict,
    VerificationFailed,
    score_probes,
    score_with_model,
)
from trainer.publish._policy import may_help
from trainer.publish._sglang import SglangRoutes

PROBES = Probes(
    texts=[list(range(7, 47)), list(range(90, 40, -1)), [3, 1, 4, 1, 5, 96, 9, 2, 6]],
    passage=[(7 * number + number // 5) % 89 for number in range(60)],
    cuts=(48, 52, 56, 60),
)
UPDATE = [
    "/pause_generation",
    "/update_weights_from_disk",
    "/flush_cache",
    "/update_weight_version",
    "/continue_generation",
]
AFTER_START = [
    ("/pause_generation", Phase.PAUSE, PauseFailed),
    ("/update_weights_from_disk", Phase.LOAD, LoadFailed),
    ("/flush_cache", Phase.RESET_CACHES, CacheResetFailed),
    ("/update_weight_version", Phase.TAG, TagFailed),
    ("/continue_generation", Phase.RESUME, ResumeFailed),
    ("/generate", Phase.VERIFY, ScoringFailed),
    ("/model_info", Phase.VERIFY, ScoringFailed),
]


@pytest.fixture
def model() -> Any:
    """What the trainer holds."""
    return tiny_model("llama", dtype=torch.float32)


@pytest.fixture
def server(model: Any) -> Iterator[SglangStandIn]:
    """Serves the same weights, at first."""
    stand_in = SglangStandIn(copy.deepcopy(model))
    with serving(stand_in):
        yield stand_in


def train(model: Any, scale: float = 0.05) -> None:
    """A step that shows at every token."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * scale)


def settings_for(*servers: SglangStandIn, **options: Any) -> PublishSettings:
    options = {"on_failure": "abort", "watch_interval": 60.0} | options
    urls = [server.url for server in servers]
    return PublishSettings(transport="disk", engine="sglang", servers=urls, **options)


@contextmanager
def publishing(
    model: Any,
    directory: Path,
    *servers: SglangStandIn,
    logprobs: LogprobPolicy | None = None,
    **options: Any,
) -> Iterator[Publisher]:
    settings = settings_for(*servers, **options)
    with Publisher(
        settings,
        transport=DiskTransport(
            directory, lambda: partial(capture_model(model, tokenizer=None).write, durable=False), keep=2
        ),
        servers=[SglangRoutes(url, settings) for url in settings.servers],
        probes=PROBES,
        score=lambda probes: score_probes(model, probes, "cpu"),
        logprobs=logprobs,
    ) as publisher:
        yield publisher


@contextmanager
def routes_to(server: SglangStandIn, **options: Any) -> Iterator[SglangRoutes]:
    routes = SglangRoutes(server.url, settings_for(server, **options))
    try:
        yield routes
    finally:
        routes.close()


def update_calls(server: SglangStandIn) -> list[str]:
    return [path for path in server.paths() if path in UPDATE]


# --- what works -----------------------------------------------------------------------------------


def test_every_version_is_loaded_between_pause_and_resume_and_proven(
    model: Any, server: SglangStandIn, tmp_path: Path
) -> None:
    with publishing(model, tmp_path, server) as publisher:
        first = publisher.start(0)
        publisher.settle()
        assert first.already_served
        assert server.engine.label == "0"
        for version in (1, 2):
            train(model)
            server.calls.clear()
            report = publisher.publish(version)
            comparison = report.servers[0].comparison
            assert comparison is not None
            assert comparison.matches
            assert comparison.fraction == pytest.approx(1.0, abs=0.01)
            assert comparison.next_tokens >= 5 * len(PROBES.cuts)
            assert comparison.cached_tokens == 0
            assert update_calls(server) == UPDATE
            assert server.engine.label == str(version)
            assert server.engine.model_path == str(tmp_path / f"v{version:06d}")
    served = dict(server.engine.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(served[name], parameter)


def test_requests_in_flight_are_never_aborted_by_a_label_or_by_loading(
    model: Any, server: SglangStandIn, tmp_path: Path
) -> None:
    with publishing(model, tmp_path, server) as publisher:
        publisher.start(0)
        train(model)
        publisher.publish(1)
    bodies = dict(server.bodies)
    assert bodies["/update_weight_version"] == {"new_version": "1", "abort_all_requests": False}
    assert not bodies["/update_weights_from_disk"].get("abort_all_requests", False)
    assert bodies["/pause_generation"] == {"mode": "retract"}


def test_scores_are_the_models_own_and_go_around_the_cache(model: Any, server: SglangStandIn) -> None:
    with routes_to(server) as routes:
        routes.next_token(PROBES.texts[0], 0)
        scores = routes.score(PROBES.texts, 0)
        expected = score_with_model(model, PROBES.texts, "cpu")
        for row, want in zip(scores, expected, strict=True):
            assert row == pytest.approx(want, abs=1e-5)
        assert routes.score([PROBES.texts[2]], 0)[0] == pytest.approx(expected[2], abs=1e-5)


@pytest.mark.parametrize(("raw", "temperature"), [(False, 1.0), (False, 0.5), (True, 0.5)])
def test_a_generated_token_comes_with_its_likeliest_rivals_and_tells_what_was_cached(
    model: Any, server: SglangStandIn, raw: bool, temperature: float
) -> None:
    prompt = PROBES.passage
    if raw:
        server.engine.lies.add("raw")
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    row = torch.log_softmax(logits if raw else logits / temperature, dim=-1)
    with routes_to(server) as routes:
        first, second = (routes.next_token(prompt, 0, temperature=temperature) for _ in range(2))
    assert first.cached_tokens == 0
    assert second.cached_tokens == len(prompt) - 1
    assert 5 <= len(first.logprobs) <= 6
    for said in (first, second):
        for token, logprob in said.logprobs.items():
            assert logprob == pytest.approx(float(row[token]), abs=1e-4)


class Rollout:
    """A request in flight while weights are published."""

    def __init__(self, server: SglangStandIn, tokens: int = 40) -> None:
        self.server = server
        self.pool = ThreadPoolExecutor(1)
        body = wire.GenerateRequest(
            input_ids=[5, 6, 7, 8],
            sampling_params=wire.SamplingParameters(max_new_tokens=tokens),
            return_logprob=True,
        )
        server.engine.token_seconds = 0.02
        self.future = self.pool.submit(
            httpx.post, f"{server.url}/generate", json=body.model_dump(exclude_unset=True), timeout=30
        )
        while not server.engine.running or len(server.engine.running[0].output) < 3:
            time.sleep(0.005)
        self.request = server.engine.running[0]

    def end(self) -> dict[str, Any]:
        reply = self.future.result(30).json()
        self.pool.shutdown()
        self.server.engine.token_seconds = 0.0
        return reply["meta_info"]


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
def test_what_happens_to_a_request_in_flight_is_what_the_mode_says(
    model: Any, server: SglangStandIn, tmp_path: Path, mode: str
) -> None:
    with publishing(model, tmp_path, server, pause_mode=mode) as publisher:
        publisher.start(0)
        train(model)
        rollout = Rollout(server)
        server.calls.clear()
        publisher.publish(1)
        meta = rollout.end()
    versions = rollout.request.versions
    if mode == "keep":
        assert meta["completion_tokens"] == 40
        assert meta["num_retractions"] == 1
        assert set(versions) == {"0", "1"}
        assert versions == sorted(versions)
    elif mode == "wait":
        assert meta["completion_tokens"] == 40
        assert set(versions) == {"0"}
        assert "/pause_generation" not in server.paths()
        assert "/flush_cache" not in server.paths()
    else:
        assert meta["finish_reason"]["type"] == "abort"
        assert 3 <= meta["completion_tokens"] < 40
        assert set(versions) == {"0"}


def test_a_retracted_request_goes_on_with_keys_and_values_of_the_new_weights(
    model: Any, server: SglangStandIn, tmp_path: Path
) -> None:
    with publishing(model, tmp_path, server) as publisher:
        publisher.start(0)
        train(model)
        rollout = Rollout(server)
        publisher.publish(1)
        rollout.end()
    request = rollout.request
    first_new = request.versions.index("1")
    tokens = request.prompt + request.output[:first_new]
    with torch.no_grad():
        row = torch.log_softmax(model(torch.tensor([tokens])).logits[0, -1].double(), dim=-1)
    assert torch.allclose(request.logprobs[first_new], row, atol=1e-5)


def test_after_an_abort_emptying_the_cache_waits_for_the_scheduler(
    model: Any, server: SglangStandIn, tmp_path: Path
) -> None:
    server.engine.idle_after = 0.4
    with publishing(model, tmp_path, server, pause_mode="abort") as publisher:
        publisher.start(0)
        train(model)
        rollout = Rollout(server)
        publisher.publish(1)
        rollout.end()
    assert "POST /flush_cache?timeout=10" in server.calls


# --- becoming ready -------------------------------------------------------------------------------


def test_a_server_that_a_dead_trainer_left_paused_is_ready_at_once(
    model: Any, server: SglangStandIn, tmp_path: Path
) -> None:
    server.health_seconds = 30.0
    server.engine.pause("retract")
    started = time.monotonic()
    with publishing(model, tmp_path, server) as publisher:
        publisher.start(0)
    assert time.monotonic() - started < 10
    assert not server.engine.held_back


def test_a_server_that_is_starting_is_waited_for(server: SglangStandIn) -> None:
    server.starting = True
    threading.Timer(0.5, lambda: setattr(server, "starting", False)).start()
    with routes_to(server) as routes:
        routes.wait_until_ready()
        assert not routes.is_paused()
        assert "GET /health" in server.calls
        server.calls.clear()
        routes.wait_until_ready()
    assert "/continue_generation" not in server.paths(), "a server that is well is left alone"


def test_a_server_that_is_never_ready_ends_in_the_deadline(server: SglangStandIn) -> None:
    server.starting = True
    with routes_to(server, ready_timeout=0.5) as routes, pytest.raises(PhaseDeadlineExceeded) as caught:
        routes.wait_until_ready()
    assert caught.value.phase is Phase.READY


def test_a_pause_shows(server: SglangStandIn) -> None:
    with routes_to(server) as routes:
        assert not routes.is_paused()
        routes.pause(3)
        assert routes.is_paused()
        routes.resume(None)
        assert not routes.is_paused()
        server.faults["/ready"] = lambda: (404, {"detail": "Not Found"})
        assert not routes.is_paused()
        routes.wait_until_ready()
        server.faults["/ready"] = lambda: (500, {"error": "broken"})
        with pytest.raises(ServerNotReady, match="broken"):
            routes.is_paused()


def test_servers_that_cannot_be_published_to_are_refused_with_the_reason(server: SglangStandIn) -> None:
    with routes_to(server) as routes:
        server.info["tokenizer_worker_num"] = 4
        with pytest.raises(ServerNotReady, match="--tokenizer-worker-num 4"):
            routes.wait_until_ready()
        server.info |= {"tokenizer_worker_num": 1, "hicache_storage_backend": "file"}
        with pytest.raises(ServerNotReady, match="--hicache-storage-backend file"):
            routes.wait_until_ready()
        server.info |= {"tp_size": 2, "dp_size": 3}
        with pytest.raises(ConnectFailed, match="--dp-size 3"):
            routes.world_size(None)
        server.info |= {"dp_size": 1, "pp_size": 2}
        with pytest.raises(ConnectFailed, match="--pp-size 2"):
            routes.world_size(None)
        server.info |= {"pp_size": 1}
        assert routes.world_size(None) == 2
        embeds = {"model_path": "m", "is_generation": False}
        server.faults["/model_info"] = lambda: (200, embeds)
        with pytest.raises(ServerNotReady, match="embeddings"):
            routes.wait_until_ready()


@pytest.mark.parametrize(
    ("key", "admin", "ours", "works"),
    [
        ("a", None, "a", True),
        (None, "b", "b", True),
        ("c", "c", "c", True),
        ("a", None, None, False),
        ("a", "b", "a", False),
        ("a", "b", "b", False),
    ],
)
def test_the_token_opens_all_routes_or_the_message_says_which_key_is_missing(
    model: Any, server: SglangStandIn, tmp_path: Path, key: str, admin: str, ours: str, works: bool
) -> None:
    server.key, server.admin_key = key, admin
    with publishing(model, tmp_path, server, token=ours) as publisher:
        if works:
            publisher.start(0)
            train(model)
            publisher.publish(1)
            return
        with pytest.raises(ServerFailure, match="--admin-api-key") as caught:
            publisher.start(0)
    assert caught.value.status == 401
    assert not may_help([caught.value], verification_failures=0)


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lie", ["stale weights", "half an update", "corrupted tensor", "stale cache", "wrong label"]
)
def test_a_server_that_does_not_serve_what_it_was_given_is_found_out(
    model: Any, server: SglangStandIn, tmp_path: Path, lie: str
) -> None:
    with publishing(model, tmp_path, server) as publisher:
        publisher.start(0)
        train(model)
        publisher.publish(1)
        server.engine.lies.add(lie)
        train(model)
        with pytest.raises(VerificationFailed) as caught:
            publisher.publish(2)
    assert not server.engine.held_back, "it goes on all the same"
    comparison = caught.value.comparison
    if lie == "wrong label":
        assert "someone else's" in str(caught.value)
        return
    assert comparison is not None
    assert not comparison.matches
    if lie == "stale weights":
        assert comparison.verdict is Verdict.STALE
        assert comparison.fraction == pytest.approx(0.0, abs=0.05)
    if lie == "stale cache":
        assert comparison.verdict is Verdict.STALE_CACHE
        assert comparison.cached_tokens == PROBES.cuts[0] - 1
        assert comparison.mean_difference is not None
        assert comparison.mean_difference < 1e-4, "the texts alone would not have shown it"


@pytest.mark.parametrize(("required", "raw", "fine"), [("scaled", False, True), ("raw", False, False)])
def test_log_probs_of_another_kind_than_the_loss_needs_are_refused_at_the_start(
    model: Any, server: SglangStandIn, tmp_path: Path, required: Any, raw: bool, fine: bool
) -> None:
    # A model that is certain enough for the temperature to make a difference.
    with torch.no_grad():
        for held in (model, server.engine.model):
            held.model.norm.weight.mul_(12.0)
    policy = LogprobPolicy(required=required)
    with publishing(model, tmp_path, server, logprobs=policy) as publisher:
        if fine:
            publisher.start(0)
        else:
            with pytest.raises(VerificationFailed, match=r"scaled, and publish\.logprobs asks for raw"):
                publisher.start(0)
            server.engine.lies.add("raw")
            publisher.start(0)


@pytest.mark.parametrize(
    ("path", "phase", "kind", "fault"),
    [
        (*route, fault)
        for route in AFTER_START
        for fault in ("500", "not understood", "no success", "another program's")
        # The reply of this one is text, from which nothing can be read.
        if (route[0], fault) != ("/flush_cache", "another program's")
    ],
)
def test_every_refusal_ends_in_its_phases_own_error_and_the_server_is_resumed(
    model: Any,
    server: SglangStandIn,
    tmp_path: Path,
    path: str,
    phase: Phase,
    kind: type[ServerFailure],
    fault: str,
) -> None:
    answers: dict[str, tuple[int, Any]] = {
        "500": (500, "Internal Server Error"),
        "not understood": (400, {"object": "error", "message": "Field required", "code": 400}),
        "no success": (200, {"success": False, "message": "it went wrong"}),
        "another program's": (200, "<html>a proxy</html>"),
    }
    with publishing(model, tmp_path, server, pause_timeout=5) as publisher:
        publisher.start(0)
        publisher.settle()
        train(model)
        server.calls.clear()
        server.faults[path] = lambda: answers[fault]
        with pytest.raises((kind, PublishFailed)) as caught:
            publisher.publish(1)
        errors = (
            caught.value.outcomes[0].errors if isinstance(caught.value, PublishFailed) else [caught.value]
        )
        assert isinstance(errors[0], kind)
        assert errors[0].phase is phase
        assert errors[0].server == server.url
        assert path in str(errors[0])
        assert "/continue_generation" in server.paths()
        server.faults.clear()
        started = time.monotonic()
        assert publisher.publish(1).verified
        assert time.monotonic() - started < 10, "a server that is still paused lets requests wait"


def test_work_that_went_wrong_is_tried_again_and_a_request_that_is_not_understood_is_not(
    server: SglangStandIn,
) -> None:
    staged = StagedWeights(version=1, dtype=None, path=Path("/nowhere/at/all"))
    with routes_to(server) as routes:
        with pytest.raises(LoadFailed, match="weights iterator") as caught:
            routes.load_directory(staged)
        assert may_help([caught.value], verification_failures=0)
        server.faults["/flush_cache"] = lambda: (400, "Flush cache failed.\n")
        with pytest.raises(CacheResetFailed, match=r"Flush cache failed\.") as refused:
            routes.reset_caches(1)
        assert may_help([refused.value], verification_failures=0)
        server.faults["/update_weights_from_disk"] = lambda: (400, {"object": "error", "message": "no"})
        with pytest.raises(LoadFailed) as final:
            routes.load_directory(staged)
        assert not may_help([final.value], verification_failures=0)
        with pytest.raises(LoadFailed, match="not written to a directory"):
            routes.load_directory(StagedWeights(version=1, dtype=None))


def test_a_pause_that_leaves_requests_where_they_are_would_keep_their_old_keys_and_values(
    server: SglangStandIn,
) -> None:
    """Why `keep` is not SGLang's `in_place`."""
    rollout = Rollout(server)
    httpx.post(f"{server.url}/pause_generation", json={"mode": "in_place"})
    with routes_to(server) as routes, pytest.raises(CacheResetFailed):
        routes.reset_caches(1)
    httpx.post(f"{server.url}/continue_generation", json={})
    rollout.end()


@pytest.mark.parametrize(("path", "phase", "kind"), AFTER_START)
def test_a_server_that_hangs_ends_in_the_phases_deadline(
    model: Any,
    server: SglangStandIn,
    tmp_path: Path,
    path: str,
    phase: Phase,
    kind: type[ServerFailure],
) -> None:
    # Only the phase that hangs: a busy machine must not end another one first.
    deadline = {Phase.LOAD: "load_timeout", Phase.VERIFY: "verify_timeout"}.get(phase, "pause_timeout")
    with publishing(model, tmp_path, server, **{deadline: 1.5}) as publisher:
        publisher.start(0)
        publisher.settle()
        train(model)
        server.faults[path] = server.hang
        with pytest.raises((PhaseDeadlineExceeded, PublishFailed)) as caught:
            publisher.publish(1)
    errors = caught.value.outcomes[0].errors if isinstance(caught.value, PublishFailed) else [caught.value]
    assert isinstance(errors[0], PhaseDeadlineExceeded)
    assert errors[0].phase is phase


def test_what_to_do_about_a_server_that_stays_paused_is_in_sglangs_words(server: SglangStandIn) -> None:
    with routes_to(server) as routes:
        server.faults["/continue_generation"] = lambda: (500, "broken")
        with pytest.raises(ResumeFailed, match="POST /continue_generation"):
            routes.resume(3)


def test_a_server_without_labels_is_no_failure(model: Any, server: SglangStandIn) -> None:
    with routes_to(server) as routes:
        server.faults["/update_weight_version"] = lambda: (404, {"detail": "Not Found"})
        routes.tag(3)
        server.faults["/model_info"] = lambda: (200, {"model_path": "somewhere"})
        assert routes.weight_version(3) is None


def meta(**changes: Any) -> Callable[[], tuple[int, Any]]:
    whole = {
        "input_token_logprobs": [[None, 7, None], [-1.0, 8, None], [-2.0, 9, None]],
        "output_token_logprobs": [[-0.5, 4, None]],
        "output_top_logprobs": [[[-0.5, 4, None]]],
        "cached_tokens": 0,
    }
    return lambda: (200, {"text": "", "meta_info": whole | changes})


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"input_token_logprobs": None}, "no input_token_logprobs"),
        ({"input_token_logprobs": [[None, 7, None], [-1.0, 8, None]]}, "2 log-probs for prompt 0 of 3"),
        ({"input_token_logprobs": [[None, 7, None], [-1.0, 6, None], [-2.0, 9, None]]}, "token 6 at 1"),
        ({"input_token_logprobs": [[None, 7, None], [None, 8, None], [-2.0, 9, None]]}, "None for token 8"),
        ({"input_token_logprobs": [[None, 7, None], [-1.0], [-2.0, 9, None]]}, "Field required"),
    ],
)
def test_prompt_log_probs_that_speak_of_something_else_are_refused(
    server: SglangStandIn, changes: dict[str, Any], found: str
) -> None:
    one = meta(**changes)
    server.faults["/generate"] = lambda: (200, [one()[1]])
    with routes_to(server) as routes, pytest.raises(ScoringFailed, match=found):
        routes.score([[7, 8, 9]], 1)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"output_token_logprobs": None}, "0 log-probs of one generated token"),
        ({"output_token_logprobs": [[-0.5, 4, None], [-0.5, 4, None]]}, "2 log-probs"),
        ({"output_token_logprobs": [[None, 4, None]]}, "no log-prob for token 4"),
        ({"output_top_logprobs": [[[None, 9, None]]]}, "no log-prob for token 9"),
    ],
)
def test_generated_log_probs_that_are_missing_are_refused(
    server: SglangStandIn, changes: dict[str, Any], found: str
) -> None:
    server.faults["/generate"] = meta(**changes)
    with routes_to(server) as routes, pytest.raises(ScoringFailed, match=found):
        routes.next_token([7, 8, 9], 1)


def test_a_reply_for_fewer_prompts_is_refused_and_one_without_rivals_is_fine(server: SglangStandIn) -> None:
    with routes_to(server) as routes:
        server.faults["/generate"] = lambda: (200, [])
        with pytest.raises(ScoringFailed, match="0 replies for 1 prompts"):
            routes.score([[7, 8, 9]], 1)
        server.faults["/generate"] = meta(output_top_logprobs=[None])
        assert routes.next_token([7, 8, 9], 1).logprobs == {4: -0.5}


# --- several servers, restarts, adapters ----------------------------------------------------------


def test_a_restarted_server_gets_the_current_version_again(
    model: Any, server: SglangStandIn, tmp_path: Path
) -> None:
    base = copy.deepcopy(model)
    with publishing(model, tmp_path, server, watch_interval=0.05) as publisher:
        publisher.start(0)
        train(model)
        publisher.publish(1)
        with server.engine.changed:
            server.engine.label = "default"
            server.engine.model.load_state_dict(base.state_dict())
        ends = time.monotonic() + 10
        while server.engine.label != "1":
            assert time.monotonic() < ends
            time.sleep(0.02)
    served = dict(server.engine.model.named_parameters())
    assert all(torch.equal(served[name], tensor) for name, tensor in model.named_parameters())


def test_adapters_go_to_it_as_merged_weights_or_not_at_all(server: SglangStandIn, tmp_path: Path) -> None:
    def nothing() -> Any:
        raise AssertionError

    with routes_to(server) as routes:
        assert not routes.takes_adapters()
        with pytest.raises(ServerNotReady, match="lora_fallback"):
            LoraTransport(tmp_path, nothing, keep=2).connect(routes)
        merged = LoraTransport(
            tmp_path, nothing, keep=2, merged=DiskTransport(tmp_path / "whole", nothing, keep=2)
        )
        merged.connect(routes)
        assert merged.needs_pause(routes)
        for call in (
            lambda: routes.adapters(1),
            lambda: routes.active_adapter(1),
            lambda: routes.load_adapter("a", tmp_path, 1),
            lambda: routes.activate_adapter("a", 1),
            lambda: routes.unload_adapter("a", 1),
            lambda: routes.score([[1, 2]], 1, served_name="a"),
            lambda: routes.next_token([1, 2], 1, served_name="a"),
        ):
            with pytest.raises(ServerFailure, match="adapters cannot be published to SGLang"):
                call()
    assert server.calls == []


# --- the wire -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*BODIES.values(), wire.SamplingParameters])
def test_a_misspelt_field_of_a_request_is_refused(kind: type[Any]) -> None:
    required = {
        name: {"str": "x", "int": 1}.get(str(field.annotation).split("'")[1], [])
        for name, field in kind.model_fields.items()
        if field.is_required() and isinstance(field.annotation, type)
    }
    required |= {
        name: [] for name, field in kind.model_fields.items() if field.is_required() and name not in required
    }
    kind.model_validate(required)
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        kind.model_validate(required | {"flush_cach": True})

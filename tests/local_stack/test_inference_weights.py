"""Pausing, loading weights, versions: a trainer's view of the embedded server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from local_stack.models import make_tiny_model
from tests.conftest import RunningInferenceServer, running_server
from tests.local_stack.inference_reference import Reference, wait_for

PROMPT = [1, 87, 85, 71, 84, 201, 50, 60]
LONG = {"max_tokens": 600, "ignore_eos": True, "seed": 7}
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def other_model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="module")
def module_server(tiny_model_directory: Path) -> Iterator[RunningInferenceServer]:
    with running_server(tiny_model_directory) as server:
        yield server


@pytest.fixture
def inference_server(module_server: RunningInferenceServer) -> Iterator[RunningInferenceServer]:
    """One server for all of these tests, as it began for each of them."""
    yield module_server
    module_server.post("/resume")
    module_server.post("/update_weight_version", {"new_version": "default"})
    assert reload(module_server, module_server.model_directory).status_code == 200


@pytest.fixture
def clients() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def start_long_request(
    server: RunningInferenceServer, clients: ThreadPoolExecutor, **fields: Any
) -> Future[list[dict[str, Any]]]:
    job = clients.submit(server.complete, PROMPT, **(LONG | fields))
    wait_for(lambda: server.engine.running > 0, "the request to run")
    return job


def prompt_logprobs(server: RunningInferenceServer) -> list[float]:
    (choice,) = server.complete(PROMPT, max_tokens=1, prompt_logprobs=0)
    return [next(iter(entry.values()))["logprob"] for entry in choice["prompt_logprobs"][1:]]


def reload(server: RunningInferenceServer, directory: Path) -> Any:
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
    return server.post("/collective_rpc", body)


def paused(server: RunningInferenceServer) -> bool:
    answer: bool = server.client.get("/is_paused").json()["is_paused"]
    return answer


def test_pause_keep_freezes_a_request_that_ends_unchanged_after_resume(
    inference_server: RunningInferenceServer, clients: ThreadPoolExecutor
) -> None:
    (undisturbed,) = inference_server.complete(PROMPT, **LONG)
    job = start_long_request(inference_server, clients)
    assert inference_server.post("/pause", mode="keep").json() == {"status": "paused"}
    late = clients.submit(inference_server.complete, PROMPT, max_tokens=2)
    assert paused(inference_server)
    assert not job.done()
    assert inference_server.engine.running == 1
    assert inference_server.post("/resume").json() == {"status": "resumed"}
    assert not paused(inference_server)
    assert job.result()[0]["token_ids"] == undisturbed["token_ids"]
    assert len(late.result()) == 1


def test_a_short_request_does_not_wait_for_long_ones(
    inference_server: RunningInferenceServer, clients: ThreadPoolExecutor
) -> None:
    job = start_long_request(inference_server, clients, n=40)  # of 64 that can run at once
    assert len(inference_server.complete(PROMPT, max_tokens=1)) == 1
    assert not job.done()
    inference_server.post("/pause")
    assert len(job.result()) == 40


def test_pause_abort_ends_requests_with_what_they_have(
    inference_server: RunningInferenceServer, clients: ThreadPoolExecutor
) -> None:
    job = start_long_request(inference_server, clients, n=3)
    inference_server.post("/pause")
    for choice in job.result():
        assert choice["finish_reason"] == "abort"
        assert len(choice["token_ids"]) == len(choice["logprobs"]["token_logprobs"]) < 600
    late = clients.submit(inference_server.complete, PROMPT, max_tokens=2)
    assert paused(inference_server)
    assert not late.done()
    inference_server.post("/resume")
    assert late.result()[0]["finish_reason"] in ("length", "stop")


def test_pause_wait_lets_running_requests_end_first(
    inference_server: RunningInferenceServer, clients: ThreadPoolExecutor
) -> None:
    job = start_long_request(inference_server, clients)
    inference_server.post("/pause", mode="wait")
    assert inference_server.engine.running == 0
    assert len(job.result()[0]["token_ids"]) == 600
    assert paused(inference_server)
    inference_server.post("/resume")


def test_reload_serves_the_new_weights_and_nothing_of_the_old(
    inference_server: RunningInferenceServer, other_model_directory: Path
) -> None:
    before = prompt_logprobs(inference_server)
    assert reload(inference_server, other_model_directory).json() == {"results": [None]}
    after = prompt_logprobs(inference_server)
    assert after == pytest.approx(
        Reference(other_model_directory).logprobs(PROMPT[:1], PROMPT[1:]), abs=TOLERANCE
    )
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 0.1
    assert reload(inference_server, inference_server.model_directory).status_code == 200
    assert prompt_logprobs(inference_server) == before


def test_a_frozen_request_goes_on_with_the_new_weights(
    inference_server: RunningInferenceServer, clients: ThreadPoolExecutor, other_model_directory: Path
) -> None:
    (old,) = inference_server.complete(PROMPT, **LONG)
    job = start_long_request(inference_server, clients)
    inference_server.post("/pause", mode="keep")
    reload(inference_server, other_model_directory)
    # Without old keys: from here on the tokens are exactly what the new weights say about the whole sequence.
    assert inference_server.post("/reset_prefix_cache", reset_running_requests=True).json() == {
        "success": True
    }
    inference_server.post("/resume")
    (new,) = job.result()
    ids = new["token_ids"]
    switch = next(at for at, (a, b) in enumerate(zip(ids, old["token_ids"], strict=True)) if a != b)
    served = new["logprobs"]["token_logprobs"]
    expected = Reference(other_model_directory).logprobs(PROMPT, ids)
    assert served[switch:] == pytest.approx(expected[switch:], abs=TOLERANCE)
    assert served[0] == pytest.approx(old["logprobs"]["token_logprobs"][0], abs=TOLERANCE)


def damage(tensors: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    last = sorted(tensors)[-1]
    if how == "missing":
        del tensors[last]
    elif how == "unknown":
        tensors["model.layers.9.extra"] = torch.zeros(3)
    elif how == "wrong shape":
        tensors[last] = torch.zeros(3)
    elif how == "another kind":
        tensors[last] = torch.zeros(tensors[last].shape, dtype=torch.int64)
    elif how == "tied weights":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    return tensors


@pytest.mark.parametrize("how", ["missing", "unknown", "wrong shape", "another kind", "tied weights"])
def test_weights_that_do_not_fit_are_refused_and_the_old_ones_stay_whole(
    inference_server: RunningInferenceServer, other_model_directory: Path, tmp_path: Path, how: str
) -> None:
    before = prompt_logprobs(inference_server)
    save_file(
        damage(load_file(other_model_directory / "model.safetensors"), how), tmp_path / "model.safetensors"
    )
    response = reload(inference_server, tmp_path)
    assert response.status_code == 400
    assert how.split()[-1] in response.json()["error"]["message"]
    assert prompt_logprobs(inference_server) == before


def test_files_that_are_no_safetensors_are_refused(
    inference_server: RunningInferenceServer, other_model_directory: Path, tmp_path: Path
) -> None:
    assert "not a directory" in reload(inference_server, tmp_path / "nowhere").json()["error"]["message"]
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert "neither" in reload(inference_server, tmp_path).json()["error"]["message"]
    whole = (other_model_directory / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in reload(inference_server, tmp_path).json()["error"]["message"]
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    assert "beside it" in reload(inference_server, tmp_path).json()["error"]["message"]
    assert inference_server.complete(PROMPT, max_tokens=1)


def test_sharded_checkpoints_are_read_whole(
    inference_server: RunningInferenceServer, other_model_directory: Path, tmp_path: Path
) -> None:
    tensors = load_file(other_model_directory / "model.safetensors")
    names = sorted(tensors)
    halves = {"one.safetensors": names[:7], "two.safetensors": names[7:]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    weight_map = ", ".join(f'"{name}": "{file}"' for file, part in halves.items() for name in part)
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{weight_map}}}}}')
    assert reload(inference_server, tmp_path).status_code == 200
    expected = Reference(other_model_directory).logprobs(PROMPT[:1], PROMPT[1:])
    assert prompt_logprobs(inference_server) == pytest.approx(expected, abs=TOLERANCE)


def test_weights_that_are_not_finite_fail_requests_but_not_the_server(
    inference_server: RunningInferenceServer, tmp_path: Path
) -> None:
    tensors = load_file(inference_server.model_directory / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    assert reload(inference_server, tmp_path).status_code == 200
    response = inference_server.post("/v1/completions", {"prompt": PROMPT})
    assert response.status_code == 500
    assert "not finite" in response.json()["error"]["message"]
    reload(inference_server, inference_server.model_directory)
    assert inference_server.complete(PROMPT, max_tokens=3)


def test_other_methods_are_refused(inference_server: RunningInferenceServer) -> None:
    for body in (
        {"method": "collect"},
        {"method": "reload_weights", "kwargs": {"weights_path": 3}},
        {"method": "reload_weights", "kwargs": {"weights_path": "x", "other": 1}},
        {"kwargs": {}},
    ):
        assert inference_server.post("/collective_rpc", body).status_code == 400
    assert inference_server.post("/pause", mode="sleep").status_code == 400


def test_the_weight_version_is_a_label_that_replies_carry(inference_server: RunningInferenceServer) -> None:
    assert inference_server.client.get("/weight_info").json() == {"weight_version": "default"}
    answer = inference_server.post("/update_weight_version", {"new_version": "17"})
    assert answer.json() == {"success": True, "new_version": "17"}
    assert inference_server.client.get("/weight_info").json() == {"weight_version": "17"}
    body = {"prompt": {"prompt_token_ids": PROMPT}, "max_tokens": 1, "logprobs": 0}
    assert inference_server.post("/generate", body).json()["weight_version"] == "17"
    assert inference_server.post("/reset_prefix_cache").json() == {"success": True}


def test_a_server_that_stops_ends_its_requests_with_what_they_have(
    start_inference_server: Callable[..., RunningInferenceServer],
    tiny_model_directory: Path,
    clients: ThreadPoolExecutor,
) -> None:
    server = start_inference_server(tiny_model_directory)
    job = start_long_request(server, clients)
    server.stop()
    assert job.result()[0]["finish_reason"] == "abort"

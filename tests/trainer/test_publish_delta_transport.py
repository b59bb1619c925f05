"""Deltas from a publisher to servers whose workers run the real receiver, over a model of a few numbers."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from inference_plugins.atropos_delta import SOURCE, TOKEN, OwnCheckpoint, Receiver, RefusedError, open_source
from schemas.inference import CollectiveRpcRequest
from tests.trainer.inference_stand_in import BASE, PROBES, Answer, Policy, StandIn, Weights, serving
from tests.trainer.publishing import eventually, settings_for
from trainer.check._inference import check_inference_server
from trainer.config import PublishSettings, load_config
from trainer.model.sharding import WHOLE, Spread
from trainer.publish import DeltaTransport, Publisher, PublishReport, ServerFailure, VllmRoutes
from trainer.publish.delta.file_server import FileServer
from trainer.publish.delta.snapshot import Snapshot
from trainer.publish.delta.update import Update
from trainer.publish.verification.probes import Probes

SECRET = "not-to-be-guessed"  # noqa: S105


def tensors_of(weights: Weights) -> dict[str, Tensor]:
    """A model whose log-probs depend on two of its numbers."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(3000, generator=generator) for name in ("one", "other", "norm")}
    tensors["one"][7], tensors["other"][7] = weights
    return tensors


class Held(nn.Module):
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors = {name: tensor.clone() for name, tensor in tensors.items()}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            self.tensors[name].copy_(tensor)


class DeltaServer(StandIn):
    """A server with the extension: one worker, whose receiver is the real one."""

    def __init__(self, started_with: dict[str, Tensor] | None = None) -> None:
        super().__init__(BASE)
        self.started_with = started_with or tensors_of(BASE)
        self.start_again()
        self.before: dict[str, Callable[[Any], Any]] = {}
        """What happens before a method of the workers is run; an answer is given instead of it."""

    def start_again(self) -> None:
        self.label, self.path = "default", "started/with"
        self.model = Held(self.started_with)
        self.receiver = Receiver(self.model, OwnCheckpoint(lambda: self.path, self._own_tensors))

    def _own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Read what was loaded last: what it was started with, or a directory."""
        file = Path(self.path) / "model.safetensors"
        return iter((load_file(file) if file.exists() else self.started_with).items())

    @property
    def weights(self) -> Weights:
        return float(self.model.tensors["one"][7]), float(self.model.tensors["other"][7])

    @weights.setter
    def weights(self, _: Weights) -> None:
        """They are the model's."""

    def answer(self, path: str, body: bytes) -> Answer:
        if path != "/collective_rpc":
            return super().answer(path, body)
        request = CollectiveRpcRequest.model_validate_json(body)
        self.calls[-1] += f"?{request.method}"
        if (before := self.before.get(request.method)) and (instead := before(request.kwargs)) is not None:
            return 200, {"results": [instead]}
        if request.method == "reload_weights":
            self.path = request.kwargs["weights_path"]
            self.model.load_weights(load_file(Path(self.path) / "model.safetensors").items())
            return 200, {"results": [None]}
        method = getattr(self.receiver, request.method.removeprefix("atropos_delta_"))
        return 200, {"results": [method(**request.kwargs)]}


class PlainServer(DeltaServer):
    """A server without it."""

    def answer(self, path: str, body: bytes) -> Answer:
        if path == "/collective_rpc" and b"atropos_delta" in body:
            return 500, {"error": {"message": "no attribute 'atropos_delta_state'"}}
        return super().answer(path, body)


class Run:
    """A trainer's tensors, published into a directory."""

    spread = WHOLE

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors = tensors_of(BASE)

    def step(self) -> None:
        """Change two numbers in three thousand of each tensor, but not the norm."""
        for name in ("one", "other"):
            self.tensors[name] = self.tensors[name].clone()
            self.tensors[name][[7, 2000]] += 0.01

    @contextmanager
    def publishing(self, *servers: StandIn, probes: Probes = PROBES, **options: Any) -> Iterator[Publisher]:
        settings = settings_for(*servers, **({"transport": "delta"} | options))

        def write(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
            path.mkdir()
            save_file(dict(tensors), path / "model.safetensors")
            (path / "config.json").write_text(json.dumps({"dtype": "float32"}))

        snapshot = Snapshot(torch.device("cpu"))

        def take(version: int) -> Update:
            return Update(snapshot, version, self.tensors.items(), self.spread)

        def policy() -> Policy:
            return Policy((float(self.tensors["one"][7]), float(self.tensors["other"][7])))

        with Publisher(
            settings,
            transport=DeltaTransport(self.directory, take, write, settings),
            servers=[VllmRoutes(url, settings) for url in settings.servers],
            probes=probes,
            score=lambda asked: policy().score(asked),
        ) as publisher:
            yield publisher

    def holds(self, server: DeltaServer) -> bool:
        return all(torch.equal(server.model.tensors[name], tensor) for name, tensor in self.tensors.items())


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv(SOURCE, str(tmp_path / "published"))
    return Run(tmp_path / "published")


@pytest.fixture
def server() -> Iterator[DeltaServer]:
    stand_in = DeltaServer()
    with serving(stand_in):
        yield stand_in


def next_version(run: Run, publisher: Publisher, version: int) -> PublishReport:
    run.step()
    report = publisher.publish(version)
    assert report.verified
    return report


def test_after_a_full_version_only_what_changed_travels_and_the_pause_is_for_writing(
    run: Run, server: DeltaServer
) -> None:
    with run.publishing(server) as publisher:
        publisher.start(0)
        full = next_version(run, publisher, 1)
        server.calls.clear()
        report = next_version(run, publisher, 2)
    assert run.holds(server)
    assert full.weight_bytes == 3 * 3000 * 4
    assert report.weight_bytes < 1000
    methods = [call.rpartition("?")[2] for call in server.calls]
    asked, paused = methods.index("atropos_delta_prepare"), methods.index("mode=keep")
    applied, resumed = methods.index("atropos_delta_apply"), methods.index("POST /resume")
    assert asked < paused < applied < resumed
    assert "atropos_delta_state" not in methods[paused:resumed]
    assert {file.name for file in run.directory.iterdir()} == {
        *("v000001.whole.safetensors", "v000002.delta.safetensors"),
    }


def test_the_passage_is_cached_right_before_the_pause(run: Run, server: DeltaServer) -> None:
    probes = Probes(texts=PROBES.texts, passage=list(range(20, 45)), cuts=(19, 21, 23, 25))
    with run.publishing(server, probes=probes) as publisher:
        publisher.start(0)
        next_version(run, publisher, 1)
        server.calls.clear()
        next_version(run, publisher, 2)
    words = ("atropos_delta_prepare", "atropos_delta_state", "/v1/completions", "/pause")
    asked = [next((word for word in words if word in call), call) for call in server.calls]
    steps = [step for step, _ in groupby(asked)]  # the state is asked for until the file is checked
    assert steps[: steps.index("/pause") + 1] == list(words)


def test_every_so_many_versions_all_of_it_travels_and_old_files_go(run: Run, server: DeltaServer) -> None:
    with run.publishing(server, delta={"anchor_every": 3}, keep=2) as publisher:
        publisher.start(0)
        small = [next_version(run, publisher, version).weight_bytes < 1000 for version in range(1, 8)]
    assert small == [False, True, True, False, True, True, False]
    assert run.holds(server)
    assert sorted(file.name for file in run.directory.iterdir()) == [
        *("v000006.delta.safetensors", "v000007.whole.safetensors"),
    ]


def test_a_server_that_started_again_gets_all_of_it(run: Run, server: DeltaServer) -> None:
    with run.publishing(server) as publisher:
        publisher.start(0)
        next_version(run, publisher, 1)
        server.start_again()
        next_version(run, publisher, 2)
        assert run.holds(server)
        assert (run.directory / "v000002.whole.safetensors").exists()
        next_version(run, publisher, 3)
    assert run.holds(server)
    assert not (run.directory / "v000003.whole.safetensors").exists()


def test_between_two_versions_a_server_that_started_again_gets_all_of_the_last(
    run: Run, server: DeltaServer
) -> None:
    with run.publishing(server, watch_interval=0.05) as publisher:
        publisher.start(0)
        next_version(run, publisher, 1)
        next_version(run, publisher, 2)
        server.start_again()
        eventually(lambda: run.holds(server) and server.label == "2")


def damage(run: Run, kwargs: dict[str, Any]) -> None:
    path = run.directory / kwargs["name"]
    if "delta" in path.name:
        path.write_bytes(path.read_bytes()[:-1] + b"?")


def lose(run: Run, kwargs: dict[str, Any]) -> None:
    if "delta" in kwargs["name"]:
        (run.directory / kwargs["name"]).unlink()


@pytest.mark.parametrize("harm", [damage, lose])
def test_a_delta_that_is_damaged_or_lost_is_found_before_the_pause(
    harm: Callable[[Run, dict[str, Any]], None],
    run: Run,
    server: DeltaServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with run.publishing(server) as publisher:
        publisher.start(0)
        next_version(run, publisher, 1)
        server.before["atropos_delta_prepare"] = partial(harm, run)
        server.calls.clear()
        report = next_version(run, publisher, 2)
    assert report.attempts == 1
    assert run.holds(server)
    assert server.paths().count("/pause") == 1
    assert "gets all of version 2" in caplog.text


def test_weights_that_changed_behind_the_trainers_back_are_found_before_the_pause(
    run: Run, server: DeltaServer, caplog: pytest.LogCaptureFixture
) -> None:
    with run.publishing(server) as publisher:
        publisher.start(0)
        next_version(run, publisher, 1)
        server.model.tensors["other"][2000] += 1e-6
        next_version(run, publisher, 2)
    assert run.holds(server)
    assert "it would hold another other than the trainer has" in caplog.text


def test_a_failure_half_way_is_mended_before_the_server_is_resumed(
    run: Run, server: DeltaServer, caplog: pytest.LogCaptureFixture
) -> None:
    with run.publishing(server) as publisher:
        publisher.start(0)
        next_version(run, publisher, 1)

        def spoil(kwargs: dict[str, Any]) -> None:
            if "delta" in kwargs["name"]:
                assert server.receiver._ready is not None
                server.receiver._ready.changes[-1].places = torch.tensor([1 << 40])

        server.before["atropos_delta_apply"] = spoil
        server.calls.clear()
        report = next_version(run, publisher, 2)
    assert "failed half-way" in caplog.text
    assert report.attempts == 1
    assert server.paths().count("/resume") == 1
    assert run.holds(server)


def test_servers_without_the_extension_get_directories_beside_those_with_it(
    run: Run, server: DeltaServer
) -> None:
    plain = PlainServer()
    with serving(plain), run.publishing(server, plain) as publisher:
        publisher.start(0)
        for version in (1, 2):
            next_version(run, publisher, version)
            assert run.holds(server)
            assert run.holds(plain)
    assert sum("atropos_delta_apply" in call for call in server.calls) == 2
    assert not any("reload_weights" in call for call in server.calls)
    assert sum("reload_weights" in call for call in plain.calls) == 2


def test_a_server_that_holds_its_weights_in_another_layout_gets_directories(
    run: Run, server: DeltaServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.model.tensors["norm"] = server.model.tensors["norm"].flip(0)
    with run.publishing(server) as publisher:
        publisher.start(0)
        next_version(run, publisher, 1)
    assert run.holds(server)
    assert "norm is not held as the checkpoint started/with has it" in caplog.text


def test_a_server_that_could_not_read_for_a_while_gets_deltas_again(
    run: Run, server: DeltaServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with run.publishing(server, keep=3) as publisher:
        publisher.start(0)
        next_version(run, publisher, 1)
        monkeypatch.setenv(SOURCE, "/nowhere")
        next_version(run, publisher, 2)
        assert "gets version 2 as a directory, and a file again with the next" in caplog.text
        monkeypatch.setenv(SOURCE, str(run.directory))
        next_version(run, publisher, 3)
        next_version(run, publisher, 4)
    assert run.holds(server)
    assert server.receiver.state()["version"] == 4
    files = {path.name for path in run.directory.iterdir()}
    assert files >= {"v000002", "v000003.whole.safetensors", "v000004.delta.safetensors"}


def test_a_server_whose_last_directory_is_gone_is_told_so_and_follows_from_the_next_version(
    run: Run, server: DeltaServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.path = str(tmp_path / "of-an-earlier-run")
    with run.publishing(server) as publisher:
        publisher.start(0)
        next_version(run, publisher, 1)
        assert (
            f"the checkpoint {tmp_path / 'of-an-earlier-run'}, which it loaded last, is gone" in caplog.text
        )
        next_version(run, publisher, 2)
    assert run.holds(server)
    assert server.receiver.state()["version"] == 2


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("v000000.whole", b'"one":{', b'"onf":{'),
        ("v000000.whole", b'"one":{', b'"oth":{'),
        ("v000000.whole", b'"F32"', b'"f32"'),
        ("v000001.delta", b":moves", b":mover"),
        ("v000001.delta", b"", b"\x01"),
    ],
)
def test_where_a_file_of_spread_weights_is_damaged_the_next_version_is_a_full_one(
    name: str, before: bytes, after: bytes, run: Run, server: DeltaServer
) -> None:
    mesh: Any = object()
    run.spread = Spread(mesh=mesh)  # over this process alone: what a server needs is put together from files
    with run.publishing(server) as publisher:
        publisher.start(0)
        next_version(run, publisher, 1)
        file = run.directory / f"{name}.safetensors"
        content = file.read_bytes()
        damaged = content.replace(before, after, 1) if before else content[:-1] + after
        assert damaged != content
        file.write_bytes(damaged)
        server.start_again()
        run.step()
        for found in (f"{name}.safetensors is damaged", "are damaged"):
            with pytest.raises(ServerFailure, match=found):
                publisher.publish(2)
        next_version(run, publisher, 3)
        assert (run.directory / "v000003.whole.safetensors").exists()
        next_version(run, publisher, 4)
    assert run.holds(server)
    assert not (run.directory / "v000004.whole.safetensors").exists()


def test_half_written_files_of_a_killed_trainer_go(run: Run, server: DeltaServer) -> None:
    run.directory.mkdir()
    left = run.directory / ".v000001.whole.safetensors.partial"
    with run.publishing(server) as publisher:
        publisher.start(0)
        left.touch()
        next_version(run, publisher, 2)
        next_version(run, publisher, 3)
    assert not left.exists()


def test_files_travel_over_http_with_the_token_and_not_without(
    run: Run, server: DeltaServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv(TOKEN, SECRET)
    with run.publishing(server, delta={"port": 0, "token": SECRET}) as publisher:
        port = caplog.text.rpartition("127.0.0.1:")[2].split()[0]
        monkeypatch.setenv(SOURCE, f"http://127.0.0.1:{port}")
        publisher.start(0)
        next_version(run, publisher, 1)
        next_version(run, publisher, 2)
        assert run.holds(server)
        assert not any("reload_weights" in call for call in server.calls)
        url = f"http://127.0.0.1:{port}/v000002.delta.safetensors"
        authorized = {"Authorization": f"Bearer {SECRET}"}
        assert httpx.get(url, headers=authorized).status_code == 200
        assert httpx.get(url).status_code == 401
        assert httpx.get(url, headers={"Authorization": "Bearer x"}).status_code == 401
        for path in ("/", "/../secrets", "/v000002", "/v000009.delta.safetensors", "/%2e%2e/x"):
            assert httpx.get(f"http://127.0.0.1:{port}{path}", headers=authorized).status_code == 404
        monkeypatch.setenv(TOKEN, "another")
        next_version(run, publisher, 3)
    assert run.holds(server)
    assert "401" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("kind", "faults", "said"),
    [
        (DeltaServer, {}, "its workers take deltas"),
        (PlainServer, {}, "every version goes there whole"),
        (DeltaServer, {"/collective_rpc": (503, None)}, "every version goes there whole"),
    ],
)
def test_check_says_whether_a_servers_workers_take_deltas(
    kind: type[DeltaServer], faults: dict[str, Any], said: str
) -> None:
    with serving(server := kind()):
        server.faults = faults
        words = ["--model.path", "any", "--publish.transport", "delta", "--publish.servers", server.url]
        results = check_inference_server(server.url, load_config(None, words), None)
    assert said in results[-1].found
    assert results[-1].status == ("ok" if said == "its workers take deltas" else "warning")


def test_a_port_without_a_token_is_refused() -> None:
    with pytest.raises(ValidationError, match="could read the weights"):
        PublishSettings(transport="delta", servers=["http://127.0.0.1:1"], delta={"port": 0})


def test_what_is_fetched_is_not_followed_elsewhere_nor_read_beyond_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if "000001" in self.path:
                self.send_response(302)
                self.send_header("Location", elsewhere)
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            sent = 0
            while sent < 1 << 30:
                try:
                    sent += self.wfile.write(bytes(1 << 16))
                except OSError:
                    break
            lengths.append(sent)

        def log_message(self, *_: Any) -> None:
            pass

    lengths: list[int] = []
    (tmp_path / "v000001.whole.safetensors").write_bytes(b"x")
    files = FileServer("127.0.0.1", 0, tmp_path, SECRET)
    elsewhere = f"http://127.0.0.1:{files.port}/v000001.whole.safetensors"
    other = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=other.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setenv(SOURCE, f"http://127.0.0.1:{other.server_address[1]}")
    monkeypatch.setenv(TOKEN, SECRET)
    try:
        with pytest.raises(RefusedError, match="HTTP 302"):
            open_source("v000001.whole.safetensors", "0" * 64, 1)
        with pytest.raises(RefusedError, match="damaged or another one: 1001 bytes"):
            open_source("v000002.whole.safetensors", "0" * 64, 1000)
        eventually(lambda: bool(lengths))
        assert lengths[0] < 1 << 26
    finally:
        other.shutdown()
        thread.join()
        other.server_close()
        files.close()

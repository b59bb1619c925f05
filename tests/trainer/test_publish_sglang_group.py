"""Weights into SGLang's workers without a disk: a real process group between real processes, on the CPU.

The server is the stand-in in a process of its own; the group is torch's, over gloo where SGLang has NCCL.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from tests.trainer.models import tiny_model
from tests.trainer.sglang_engine import init_group
from tests.trainer.test_publish_sglang import PROBES, train
from tests.trainer.test_publish_vllm_transfer import free_ports
from trainer.config import PublishSettings
from trainer.errors import CheckpointError, ConfigurationError
from trainer.model_directory import write_model_directory
from trainer.publish import (
    ConnectFailed,
    LoadFailed,
    Phase,
    PhaseDeadlineExceeded,
    Publisher,
    PublishFailed,
    ResumeFailed,
    WeightStream,
    score_probes,
)
from trainer.publish._rendezvous import PORT_ATTEMPTS, RendezvousPorts
from trainer.publish._sglang import SglangRoutes
from trainer.publish._sglang_group import SglangGroupTransport
from trainer.publish._sglang_sender import GroupPlace, TorchGroup, sglang_group

pytestmark = pytest.mark.slow

BUCKET_BYTES = 8192
START_SECONDS = 60.0


class Remote:
    """The stand-in in a process of its own."""

    def __init__(self, model: Any, directory: Path) -> None:
        write_model_directory(directory / "model", model=model, tokenizer=None)
        port_file = directory / "url"
        command = [sys.executable, "-m", "tests.trainer.sglang_stand_in", str(directory / "model")]
        self.process = subprocess.Popen([*command, "--port-file", str(port_file)])
        ends = time.monotonic() + START_SECONDS
        while not port_file.exists():
            assert self.process.poll() is None, "the stand-in did not start"
            assert time.monotonic() < ends, "the stand-in did not start in time"
            time.sleep(0.05)
        self.url = port_file.read_text()

    def steer(self, **wishes: Any) -> dict[str, Any]:
        reply: dict[str, Any] = httpx.post(f"{self.url}/stand_in", json=wishes).json()
        return reply

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def base() -> Any:
    return tiny_model("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def shared(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    remote = Remote(base, tmp_path_factory.mktemp("sglang"))
    yield remote
    remote.kill()


@pytest.fixture
def server(shared: Remote) -> Iterator[Remote]:
    """A server whose earlier requests are forgotten, but not its weights."""
    shared.steer(calls=[], refused_weight=None, never_joins=False, in_session=False)
    yield shared
    httpx.post(f"{shared.url}/continue_generation", json={})


@pytest.fixture
def model(base: Any) -> Any:
    """What the trainer holds: something else than any server."""
    model = copy.deepcopy(base)
    train(model)
    return model


class Group(TorchGroup):
    """Over gloo; may misbehave."""

    def __init__(self) -> None:
        super().__init__(init_group, backend="gloo")
        self.silent = False
        """Broadcasts never begin."""
        self.on_silence: Callable[[], None] = lambda: None
        self.sent: list[list[str]] = []
        self.left = threading.Event()

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        if self.silent:
            self.on_silence()
            self.left.wait(30)
            raise RuntimeError("aborted")
        self.sent.append([str(tensor.dtype) for tensor in tensors])
        super().broadcast(tensors)

    def leave(self) -> None:
        self.left.set()
        super().leave()


class Side:
    """The trainer's side."""

    def __init__(self, model: Any, server: Remote, *, dtype: torch.dtype = torch.float32, **options: Any):
        self.settings = PublishSettings(
            transport="nccl",
            engine="sglang",
            servers=[server.url],
            group_port=free_ports(),
            **({"load_timeout": 20.0, "pause_timeout": 5.0, "on_failure": "abort"} | options),
        )
        self.model = model
        self.stream = WeightStream(model, dtype=dtype, bucket_bytes=BUCKET_BYTES)
        self.groups: list[Group] = []
        self.transport = SglangGroupTransport(self.stream, self.settings, build=self.build)
        self.routes = SglangRoutes(server.url, self.settings)

    def build(self) -> Group:
        self.groups.append(Group())
        return self.groups[-1]

    @contextmanager
    def publishing(self) -> Iterator[Publisher]:
        with Publisher(
            self.settings,
            transport=self.transport,
            servers=[self.routes],
            probes=PROBES,
            score=lambda probes: score_probes(self.model, probes, "cpu"),
        ) as publisher:
            yield publisher


def test_what_is_broadcast_is_what_is_served_every_time(model: Any, server: Remote) -> None:
    side = Side(model, server)
    with side.publishing() as publisher:
        report = publisher.start(0)
        assert not report.already_served
        server.steer(calls=[])
        train(model)
        report = publisher.publish(1)
    comparison = report.servers[0].comparison
    assert comparison is not None
    assert comparison.matches
    assert comparison.fraction == pytest.approx(1.0, abs=0.01)
    assert report.weight_bytes == side.stream.total_bytes
    seen = server.steer()
    buckets = len(list(side.stream.buckets()))
    assert buckets > 3
    assert seen["paths"]["/update_weights_from_distributed"] == buckets
    assert seen["groups"] == 0, "the group was left at the end"
    assert not seen["in_session"]
    update = [path.split(" ")[1].split("?")[0] for path in seen["calls"]]
    begin = update.index("/pause_generation")
    end = update.index("/continue_generation")
    assert update[begin : end + 1] == [
        "/pause_generation",
        "/begin_weight_update",
        *["/update_weights_from_distributed"] * buckets,
        "/end_weight_update",
        "/flush_cache",
        "/update_weight_version",
        "/continue_generation",
    ]


def test_tied_weights_travel_once_and_everything_in_the_served_type(model: Any, server: Remote) -> None:
    side = Side(model, server, dtype=torch.bfloat16, tolerance=0.25)
    with side.publishing() as publisher:
        publisher.start(0)
    names = [entry.name for entry in side.stream.entries()]
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names
    sent = [dtype for bucket in side.groups[0].sent for dtype in bucket]
    assert sent == ["torch.bfloat16"] * len(names)


def test_an_update_that_a_trainer_before_us_left_open_is_ended_first(model: Any, server: Remote) -> None:
    server.steer(in_session=True)
    with Side(model, server).publishing() as publisher:
        assert publisher.start(0).verified


def test_a_refused_weight_ends_both_sides_at_once_and_the_next_publish_works(
    model: Any, server: Remote
) -> None:
    side = Side(model, server)
    with side.publishing() as publisher:
        publisher.start(0)
        train(model)
        server.steer(refused_weight="model.norm.weight")
        started = time.monotonic()
        with pytest.raises(LoadFailed, match=r"model\.norm\.weight"):
            publisher.publish(1)
        assert time.monotonic() - started < 10
        seen = server.steer(refused_weight=None)
        assert not seen["in_session"]
        assert seen["groups"] == 0
        assert publisher.publish(1).verified
    assert len(side.groups) == 2, "a group that failed is never used again"


def test_a_server_that_refuses_before_it_receives_does_not_hold_up_the_broadcast(
    model: Any, server: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = Side(model, server)
    with side.publishing() as publisher:
        publisher.start(0)
        train(model)
        staged = side.transport.capture(1)()
        monkeypatch.setattr(side.transport._links[server.url], "begin", lambda: None)
        side.groups[0].silent = True  # as a broadcast for which nobody has come
        started = time.monotonic()
        with pytest.raises(LoadFailed, match="begin_weight_update"):
            side.transport.load(side.routes, staged)
        assert time.monotonic() - started < 5
        assert side.groups[0].left.is_set()


def test_a_broadcast_that_never_comes_ends_in_the_deadline_and_lets_the_server_go(
    model: Any, server: Remote
) -> None:
    side = Side(model, server, load_timeout=5.0)
    with side.publishing() as publisher:
        publisher.start(0)
        train(model)
        side.groups[0].silent = True
        with pytest.raises(PhaseDeadlineExceeded, match="did not end within 5 s") as caught:
            publisher.publish(1)
        assert caught.value.phase is Phase.LOAD
        assert side.groups[0].left.is_set()
    with Side(model, server).publishing() as publisher:
        assert publisher.start(1).verified


def test_workers_that_never_join_end_in_the_deadline(model: Any, server: Remote) -> None:
    server.steer(never_joins=True)
    side = Side(model, server, load_timeout=1.0)
    try:
        with pytest.raises(PhaseDeadlineExceeded, match="did not come together within 1 s") as caught:
            side.transport.connect(side.routes)
        assert caught.value.phase is Phase.CONNECT
        with pytest.raises(LoadFailed, match="no process group"):
            side.transport.load(side.routes, side.transport.capture(1)())
    finally:
        side.transport.close([side.routes])
        side.routes.close()


def test_a_server_that_dies_in_a_transfer_is_reported_at_once(base: Any, model: Any, tmp_path: Path) -> None:
    mortal = Remote(base, tmp_path)
    try:
        side = Side(model, mortal, load_timeout=60.0)
        with side.publishing() as publisher:
            publisher.start(0)
            train(model)
            side.groups[0].silent = True
            side.groups[0].on_silence = lambda: (time.sleep(0.5), mortal.kill())
            started = time.monotonic()
            with pytest.raises(PublishFailed) as caught:
                publisher.publish(1)
            assert time.monotonic() - started < 30, "sooner than the deadline"
        loading, resuming = caught.value.outcomes[0].errors
        assert isinstance(loading, LoadFailed)
        assert isinstance(resuming, ResumeFailed)
    finally:
        mortal.kill()


def test_a_failure_on_our_own_side_is_a_failed_load(
    model: Any, server: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = Side(model, server)
    with side.publishing() as publisher:
        publisher.start(0)

        def broken() -> Iterator[list[tuple[str, Tensor]]]:
            raise CheckpointError("a layer is gone")
            yield []

        with monkeypatch.context() as patched:
            patched.setattr(side.stream, "buckets", broken)
            with pytest.raises(LoadFailed, match="a layer is gone"):
                publisher.publish(1)
        assert not server.steer()["in_session"]
        assert publisher.publish(1).verified


def test_a_server_without_the_routes_or_with_copies_of_the_model_is_named(
    model: Any, server: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = Side(model, server)
    try:
        monkeypatch.setattr(side.routes, "world_size", lambda version: 1)
        refusal = ConnectFailed("HTTP 404", server=server.url, phase=Phase.CONNECT, status=404)

        def refuse(route: str, body: Any, version: int | None) -> None:
            raise refusal

        monkeypatch.setattr(side.routes, "weight_request", refuse)
        with pytest.raises(ConnectFailed, match="takes no weights from a process group"):
            side.transport.connect(side.routes)
    finally:
        side.groups[0].leave()
        side.routes.close()


# --- without a server -----------------------------------------------------------------------------


def test_a_pause_that_waits_is_refused_because_there_is_none(model: Any) -> None:
    stream = WeightStream(model, dtype=None, bucket_bytes=BUCKET_BYTES)
    settings = PublishSettings(
        transport="nccl", engine="sglang", servers=["http://127.0.0.1:1"], pause_mode="wait"
    )
    with pytest.raises(ConfigurationError, match=r"pause_mode wait"):
        SglangGroupTransport(stream, settings, build=Group)


def test_a_trainer_without_a_gpu_or_without_sglang_is_told_so(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = WeightStream(model, dtype=None, bucket_bytes=BUCKET_BYTES)
    settings = PublishSettings(transport="nccl", engine="sglang", servers=["http://127.0.0.1:1"])
    with pytest.raises(ConfigurationError, match="the model is on cpu"):
        SglangGroupTransport(stream, settings)
    monkeypatch.setitem(sys.modules, "sglang", None)
    with pytest.raises(ConfigurationError, match="install the servers' version of sglang"):
        sglang_group(torch.device("cuda"))
    for name in ("sglang", "sglang.srt", "sglang.srt.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(ConfigurationError, match="does not have"):
        sglang_group(torch.device("cuda"))
    sys.modules["sglang.srt.utils"].init_custom_process_group = init_group  # type: ignore[attr-defined]
    assert sglang_group(torch.device("cuda"))().backend == "nccl"


def test_the_rendezvous_address_is_a_url_with_version_6_too() -> None:
    place = GroupPlace(address="::1", port=5, world_size=2, name="n", seconds=1.0)
    assert place.url == "tcp://[::1]:5"


def test_every_server_has_ports_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    servers = ["http://a:1", "http://b:1/"]
    first = free_ports()
    ports = RendezvousPorts(PublishSettings(transport="nccl", servers=servers, group_port=first))
    assert ports.free("http://a:1") == first
    assert ports.free("http://b:1") == first + 1
    monkeypatch.setattr(RendezvousPorts, "_is_free", lambda self, port, server: port >= first + 4)
    assert ports.free("http://b:1") == first + 5
    monkeypatch.setattr(RendezvousPorts, "_is_free", lambda self, port, server: False)
    with pytest.raises(ConnectFailed, match=f"{first + 2 * (PORT_ATTEMPTS - 1)} for the rendezvous"):
        ports.free("http://a:1")


def test_an_address_that_is_not_ours_is_named() -> None:
    settings = PublishSettings(transport="nccl", servers=["http://a:1"], group_address="192.0.2.1")
    with pytest.raises(ConnectFailed, match=r"publish\.group_address has to be an address of this machine"):
        RendezvousPorts(settings).free("http://a:1")

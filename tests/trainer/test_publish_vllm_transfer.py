"""Weights into vLLM's workers without a disk: what arrives, and what happens when one side fails."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.forked import forked_ranks
from tests.ports import free_port
from tests.trainer.inference_stand_in import serving
from tests.trainer.models import stream_of, tiny_model
from tests.trainer.transfer_stand_in import NCCLEngine, Receiver, modules
from trainer.config import PublishSettings
from trainer.errors import ConfigurationError
from trainer.publish import Phase, PhaseDeadlineExceeded, ServerFailure, VllmRoutes
from trainer.publish.engines.vllm import nccl_transport
from trainer.publish.engines.vllm.nccl_sender import TransferGroup, build_engine, require_vllm
from trainer.publish.engines.vllm.nccl_transport import VllmTransferTransport
from trainer.publish.interfaces import StagedWeights
from trainer.publish.transports.bounded_call import BoundedCall

HANDSHAKE = [
    "/atropos/adapter",
    "/shutdown_weight_transfer_engine",
    "/get_world_size",
    "/init_weight_transfer_engine",
]
UPDATE = ["/start_weight_update", "/update_weights", "/finish_weight_update"]


@pytest.fixture(autouse=True)
def senders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[NCCLEngine]]:
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    NCCLEngine.built.clear()
    NCCLEngine.sending[:] = [0, 0]
    yield NCCLEngine.built
    for engine in NCCLEngine.built:
        if engine.hang is not None:
            engine.hang.set()
        if hasattr(engine, "wire"):
            engine.wire.joined.set()
            engine.shutdown()


@pytest.fixture
def model() -> Any:
    return tiny_model("qwen2", dtype=torch.float32)


def other_model() -> nn.Module:
    model = tiny_model("qwen2", dtype=torch.bfloat16)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


@pytest.fixture
def stand_in() -> Receiver:
    return Receiver(other_model())


class Side:
    """The trainer's side of one or several servers."""

    def __init__(
        self, model: nn.Module, *servers: Receiver, backend: Any = "nccl", port: int = 0, **options: Any
    ):
        self.stream = stream_of(model, torch.bfloat16, bucket_bytes=4096)
        settings = PublishSettings(
            transport=backend,
            servers=[server.url for server in servers],
            group_port=port or free_port(),
            token="secret",  # noqa: S106 - of a stand-in
            **({"load_timeout": 20.0, "pause_timeout": 5.0} | options),
        )
        self.settings = settings
        self.routes = [VllmRoutes(server.url, settings) for server in servers]
        self.transport = VllmTransferTransport(backend, self.stream, settings, build=build_engine)

    def connect(self, number: int = 0) -> None:
        self.transport.connect(self.routes[number])

    def load(self, version: int, number: int = 0) -> StagedWeights:
        self.routes[number].name_in_messages(version)
        staged = self.transport.capture(version)()
        self.transport.load(self.routes[number], staged)
        return staged

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.transport.close(self.routes)
        for routes in self.routes:
            routes.close()


def assert_arrived(server: Receiver, model: nn.Module) -> None:
    received = server.model.state_dict()
    assert not server.half_done
    for name, tensor in model.state_dict().items():
        assert torch.equal(received[name], tensor.to(torch.bfloat16)), name


@pytest.mark.parametrize("backend", ["nccl", "ipc"])
def test_what_the_trainer_holds_is_what_the_server_gets_every_time(
    backend: str, model: Any, server: Receiver
) -> None:
    with Side(model, server, backend=backend) as side:
        side.connect()
        staged = side.load(1)
        assert_arrived(server, model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.25)
        side.load(2)
        assert_arrived(server, model)
    assert (staged.version, staged.dtype, staged.path) == (1, "bfloat16", None)
    assert staged.weight_bytes == sum(tensor.nbytes for tensor in server.model.state_dict().values())
    if backend == "nccl":
        assert server.paths() == [*HANDSHAKE, *UPDATE, *UPDATE, "/shutdown_weight_transfer_engine"]
    assert server.authorizations == {"Bearer secret"}


def test_several_servers_have_a_port_each_and_get_the_weights_in_turn(model: Any) -> None:
    receivers = [Receiver(other_model()) for _ in range(3)]
    with serving(*receivers), Side(model, *receivers) as side:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(side.connect, range(3)))
            list(pool.map(lambda number: side.load(1, number), range(3)))
        first = side.settings.group_port
        ports = [receiver.init_info["master_port"] - first for receiver in receivers]
        assert [port % 3 for port in ports] == [0, 1, 2]  # further by threes where one is taken
    for receiver in receivers:
        assert_arrived(receiver, model)
    assert NCCLEngine.sending == [0, 1]


def test_a_refusal_that_comes_before_anybody_waits_is_heard_too(
    model: Any, server: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    class QuickThread(threading.Thread):
        """One that is far ahead of whoever started it."""

        def start(self) -> None:
            super().start()
            self.join(0.5)

    server.faults["/init_weight_transfer_engine"] = (500, {"error": {"message": "not configured"}})
    with Side(model, server) as side:
        before = set(threading.enumerate())
        monkeypatch.setattr(threading, "Thread", QuickThread)
        with pytest.raises(ServerFailure, match=r"connect failed.*not configured"):
            side.connect()
        # The sender itself still waits for the workers.
        assert any(each.name.startswith("connect ") for each in set(threading.enumerate()) - before)


@pytest.mark.parametrize("first", ["call", "request"])
def test_workers_that_never_join_end_in_the_deadline_and_do_not_spoil_the_next_attempt(
    first: str, model: Any, server: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    if first == "request":  # a thread that waits may be woken late
        within = BoundedCall.within
        monkeypatch.setattr(BoundedCall, "within", lambda call, seconds: within(call, seconds + 5))
    server.joins = False
    with Side(model, server, load_timeout=0.5) as side:
        with pytest.raises(PhaseDeadlineExceeded, match=r"did not come together within 0.5 s") as caught:
            side.connect()
        assert caught.value.phase is Phase.CONNECT
        server.joins = True
        port = side.settings.group_port
        with Side(model, server, port=port) as patient:
            patient.connect()  # although the first rendezvous still holds its port
            assert server.init_info["master_port"] > port
            patient.load(1)
    assert_arrived(server, model)


def test_workers_that_come_after_the_deadline_find_a_group_that_is_left(model: Any, server: Receiver) -> None:
    came, left = threading.Event(), threading.Event()

    class Late:
        def send_weights(self) -> None:
            raise AssertionError("nobody holds it")

        def shutdown(self) -> None:
            left.set()

    def build(_group: TransferGroup) -> Late:
        came.wait(20)
        return Late()

    with Side(model, server, load_timeout=0.2) as side:
        transport = VllmTransferTransport("nccl", side.stream, side.settings, build=build)
        with pytest.raises(PhaseDeadlineExceeded):
            transport.connect(side.routes[0])
        assert not left.is_set()
        came.set()
        assert left.wait(5)
        with pytest.raises(ServerFailure, match=r"load failed.*no transfer group"):
            transport.load(side.routes[0], transport.capture(1)())


def test_a_refused_update_is_reported_at_once_and_the_server_is_brought_out_of_it(
    model: Any, server: Receiver, senders: list[NCCLEngine]
) -> None:
    server.refuse_weight = lambda name: name == "model.norm.weight"
    with Side(model, server) as side:
        side.connect()
        senders[0].hang = threading.Event()  # the others of its group never come
        server.faults["/update_weights"] = lambda: server_error(server)
        with pytest.raises(ServerFailure, match=r"load failed.*HTTP 500") as caught:  # and no deadline
            side.load(3)
        assert caught.value.version == 3
        assert not server.half_done
        assert senders[0].left.is_set()
        server.faults.clear()
        server.refuse_weight = lambda _name: False
        with pytest.raises(ServerFailure, match=r"load failed.*no transfer group"):
            side.load(3)
        side.connect()
        side.load(3)
    assert_arrived(server, model)


def server_error(server: Receiver) -> Any:
    server.updating = False  # as vLLM's worker does
    return 500, {"error": {"message": "no such weight"}}


def test_a_transfer_that_hangs_ends_in_the_deadline_and_its_group_is_never_used_again(
    model: Any, server: Receiver, senders: list[NCCLEngine]
) -> None:
    with Side(model, server, load_timeout=2.0) as side:
        side.connect()
        senders[0].hang = threading.Event()
        with pytest.raises(PhaseDeadlineExceeded, match=r"did not end within 2 s") as caught:
            side.load(1)
        assert (caught.value.phase, caught.value.version) == (Phase.LOAD, 1)
        assert senders[0].left.is_set()
        server.updating = False  # restarted
        calls = len(server.calls)
        senders[0].hang.set()  # it wakes up, too late
        time.sleep(0.3)
        assert len(server.calls) == calls
    with Side(model, server) as patient:
        patient.connect()
        patient.load(1)
    assert_arrived(server, model)


def test_a_restarted_server_gets_a_new_group_although_the_old_one_cannot_be_left(
    model: Any, server: Receiver, senders: list[NCCLEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    for_ever = threading.Event()
    with Side(model, server) as side:
        side.connect()
        side.load(1)
        monkeypatch.setattr(senders[0], "shutdown", lambda: for_ever.wait(20))
        server.model = other_model()
        side.connect()
        side.load(1)
        for_ever.set()
        assert len(senders) == 2
        assert senders[1].info.master_port != senders[0].info.master_port
    assert_arrived(server, model)


def test_an_update_that_a_trainer_before_us_left_half_done_is_ended_first(
    model: Any, server: Receiver
) -> None:
    server.updating = server.half_done = True
    with Side(model, server) as side:
        side.connect()
        assert not server.updating
        side.load(1)
    assert_arrived(server, model)


@pytest.mark.parametrize(
    ("options", "what", "found"),
    [
        ({}, "lacks its routes", r"connect failed.*VLLM_SERVER_DEV_MODE=1"),
        ({}, "is gone", r"connect failed.*no connection"),
        ({"pause_timeout": 0.3}, "hangs", r"connect failed.*only a restart of the server helps"),
        ({"group_address": "192.0.2.1"}, "", r"publish\.group_address has to be an address of this machine"),
        ({}, "finds no port", r"all taken; set another publish\.group_port"),
        ({"backend": "ipc"}, "has two workers", r"connect failed.*it has 2 workers"),
    ],
)
def test_a_handshake_that_cannot_succeed_says_why(
    options: dict[str, Any],
    what: str,
    found: str,
    model: Any,
    server: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with contextlib.ExitStack() as stack:
        side = stack.enter_context(Side(model, server, **options))
        match what:
            case "lacks its routes":
                server.faults = {route: (404, {"detail": "Not Found"}) for route in HANDSHAKE}
            case "is gone":
                side.routes[0] = VllmRoutes("http://127.0.0.1:1", side.settings)
            case "hangs":
                server.faults["/shutdown_weight_transfer_engine"] = server.hang
            case "finds no port":
                monkeypatch.setattr(nccl_transport, "PORT_ATTEMPTS", 1)
                stack.enter_context(socket.create_server(("127.0.0.1", side.settings.group_port)))
            case "has two workers":
                server.workers = 2
        with pytest.raises(ServerFailure, match=found):
            side.connect()


def test_ipc_refuses_a_server_elsewhere(model: Any) -> None:
    for elsewhere in ("http://192.0.2.7:8000", "http://gpu.example:8000"):
        settings = PublishSettings(transport="ipc", servers=[elsewhere])
        with pytest.raises(ConfigurationError, match="not a loopback address"):
            VllmTransferTransport("ipc", stream_of(model), settings, build=build_engine)


def test_ipc_names_the_variable_that_the_server_needs(model: Any, server: Receiver) -> None:
    server.faults["/update_weights"] = (400, {"error": {"message": "Refusing to deserialize"}})
    with Side(model, server, backend="ipc") as side:
        side.connect()
        with pytest.raises(ServerFailure, match=r"load failed.*VLLM_ALLOW_INSECURE_SERIALIZATION=1"):
            side.load(1)


def test_a_trainer_without_a_gpu_is_told_so(model: Any) -> None:
    settings = PublishSettings(transport="nccl", servers=["http://127.0.0.1:1"])
    stream = stream_of(model, bucket_bytes=4096)
    with pytest.raises(ConfigurationError, match=r"the model is on cpu; use publish\.transport disk"):
        VllmTransferTransport("nccl", stream, settings)


def test_a_trainer_without_vllm_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in modules():
        monkeypatch.setitem(sys.modules, name, None)  # what Python sees of a package that is not installed
    with pytest.raises(
        ConfigurationError, match=r"install the servers' version of vllm .* publish\.transport disk"
    ):
        require_vllm("nccl", torch.device("cuda", 0))
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    require_vllm("nccl", torch.device("cuda", 0))
    monkeypatch.delattr(sys.modules["vllm.distributed.weight_transfer"], "WeightTransferTrainerFactory")
    with pytest.raises(ConfigurationError, match=r"0\.32 or newer"):
        require_vllm("nccl", torch.device("cuda", 0))


@pytest.mark.slow
def test_weights_spread_over_processes_arrive_after_a_transfer_that_stopped_in_the_middle(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    runs = {}
    for fault in ("refused", "hung"):
        log = tmp_path / f"{fault}.log"
        words = [tiny_model_directory, tmp_path / fault, free_port(), fault]
        runs[log] = forked_ranks(
            2, free_port(), "tests.trainer.spread_transfer_run", words, stdout=log, stderr=log
        )
    try:
        for log, ranks in runs.items():
            assert [rank.wait(100) for rank in ranks] == [0, 0], log.read_text()[-3000:]
    finally:
        for rank in chain(*runs.values()):
            rank.kill()

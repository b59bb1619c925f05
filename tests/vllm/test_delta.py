"""Deltas to a real vLLM: bit by bit what the trainer has, with one worker and with two, or not at all."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.compose import ROOT
from tests.ports import free_port
from tests.trainer.runs import rows
from tests.trainer.test_multiprocess import run_in_processes
from tests.vllm.conftest import StartVllm
from tests.vllm.launching import VLLM_PYTHON, VllmServer
from trainer.config import PublishSettings
from trainer.export.hf_model import write_model_directory
from trainer.model.base_checkpoint import read_base
from trainer.model.weight_stream import WeightStream
from trainer.publish import (
    DeltaTransport,
    Publisher,
    VllmRoutes,
    make_probes,
    score_probes,
    score_with_model,
)
from trainer.publish.delta.files import Label, PublishedFile, delta_name, write_file
from trainer.publish.delta.snapshot import Snapshot
from trainer.publish.delta.update import Update

TEXT = list(range(20, 90))
SECRET = "of-this-test"  # noqa: S105
EXTENSION = ("--worker-extension-cls", "tests.vllm.spoiled_delta.SpoiledDelta")
PYTHONPATH = f"{ROOT / 'inference_plugins'}:{ROOT}"


class Run:
    """A model whose every step changes a few of its numbers, and its publishes."""

    def __init__(self, server: VllmServer, directory: Path) -> None:
        self.server = server
        self.directory = directory
        self.model: Any = AutoModelForCausalLM.from_pretrained(server.model, dtype=torch.float32)
        self.stream = WeightStream(self.model, read_base(str(server.model)))
        self.generator = torch.Generator().manual_seed(0)

    def step(self, share: float = 0.02) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                places = torch.rand(parameter.shape, generator=self.generator) < share
                parameter += places * 0.01 * torch.randn(parameter.shape, generator=self.generator)

    @contextmanager
    def publishing(self, routes: type[VllmRoutes] = VllmRoutes, **options: Any) -> Iterator[Publisher]:
        settings = PublishSettings(
            **({"transport": "delta", "servers": [self.server.url], "on_failure": "abort"} | options)
        )

        snapshot = Snapshot(torch.device("cpu"))

        def take(version: int) -> Update:
            return Update(snapshot, version, self.stream.weights())

        def write(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
            write_model_directory(path, self.stream, tensors, durable=False)

        with Publisher(
            settings,
            transport=DeltaTransport(self.directory, take, write, settings),
            servers=[routes(self.server.url, settings)],
            probes=make_probes(AutoTokenizer.from_pretrained(self.server.model), context=2048),
            score=lambda probes: score_probes(self.model, probes, "cpu"),
        ) as publisher:
            yield publisher

    def served(self) -> list[float]:
        """What the server makes of a text, past its prefix cache."""
        with VllmConnection(self.server) as routes:
            return routes.score([TEXT])[0]

    def ours(self) -> list[float]:
        return score_with_model(self.model, [TEXT], "cpu")[0]


class VllmConnection(VllmRoutes):
    """Speaks to a server that is ready."""

    def __init__(self, server: VllmServer) -> None:
        super().__init__(server.url, PublishSettings(servers=[server.url]), served_model_name="policy")

    def __enter__(self) -> VllmConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FailsHalfWay(VllmRoutes):
    """A server whose workers fail while they write; what they get after it they write."""

    fails = False

    def pause(self) -> None:
        super().pause()
        if not self.fails:
            return
        httpx.post(f"{self.url}/collective_rpc", json={"method": "atropos_delta_spoil"}, timeout=60)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module")
def server(vllm_model_directory: Path, start_vllm: StartVllm, published: Path) -> VllmServer:
    environment = {"PYTHONPATH": PYTHONPATH, "ATROPOS_DELTA_SOURCE": str(published)}
    return start_vllm(vllm_model_directory, flags=EXTENSION, environment=environment)


@pytest.fixture
def run(server: VllmServer, published: Path) -> Run:
    return Run(server, published)


def held_by(server: VllmServer, directory: Path) -> dict[str, Tensor]:
    """What vLLM itself saves of its weights: in its own layout, by its own code."""
    directory.mkdir()
    reply = server.post(
        "/collective_rpc", {"method": "save_sharded_state", "kwargs": {"path": str(directory)}}
    )
    assert reply.status_code == 200, reply.text
    return {name: each for file in directory.glob("*.safetensors") for name, each in load_file(file).items()}


def assert_held(held: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Compare vLLM's fused weights with the checkpoint's, bit by bit."""
    compared = 0
    held.setdefault("model.embed_tokens.weight", held["lm_head.weight"])  # tied: saved under one name
    for name, tensor in tensors.items():
        if "q_proj" in name:
            parts = [tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            name, tensor = name.replace("q_proj", "qkv_proj"), torch.cat(parts)
        elif "gate_proj" in name:
            name, tensor = (
                name.replace("gate_proj", "gate_up_proj"),
                torch.cat([tensor, tensors[name.replace("gate_proj", "up_proj")]]),
            )
        elif any(part in name for part in ("k_proj", "v_proj", "up_proj")):
            continue
        theirs = held[name][: len(tensor)]  # rows of the vocabulary are filled up
        assert torch.equal(theirs.view(torch.int32), tensor.view(torch.int32)), name
        compared += 1
    assert compared == 2 * 6 + 2


def test_after_fifty_deltas_the_server_holds_the_full_checkpoints_bits(run: Run, tmp_path: Path) -> None:
    with run.publishing(delta={"anchor_every": 100}, verify=False) as publisher:
        publisher.start(0)
        for version in range(1, 51):
            run.step()
            report = publisher.publish(version)
            assert report.weight_bytes < 0.2 * run.stream.total_bytes
    assert [file.name for file in run.directory.glob("*.whole.*")] == []  # it has lived on deltas
    tensors = dict(run.stream.weights())
    assert_held(held_by(run.server, tmp_path / "state"), tensors)
    after_deltas = run.served()
    assert after_deltas == pytest.approx(run.ours(), abs=2e-4)
    write_model_directory(tmp_path / "full", run.stream, durable=False)
    with VllmConnection(run.server) as routes:
        routes.load_directory(tmp_path / "full", 50)
        assert routes.delta_states() is not None
        assert [state.version for state in routes.delta_states() or []] == [None]  # no longer ours
    assert run.served() == after_deltas  # the packed copies too, to the last bit


def test_two_processes_over_which_the_weights_are_spread_publish_what_changed(
    run: Run, free_port: int, tmp_path: Path
) -> None:
    options = ["--parallel.mode", "sharded", "--publish.transport", "delta"]
    options += ["--publish.directory", str(run.directory), "--publish.servers", run.server.url]
    output = tmp_path / "run"
    run_in_processes(2, run.server.model, output, *options, port=free_port, steps=2, launcher="torchrun")
    published = rows(output, "publish")
    assert [row["version"] for row in published] == [0, 1, 2]
    assert all(row["publish_verified"] is True for row in published)
    with VllmConnection(run.server) as routes:
        assert [state.version for state in routes.delta_states() or []] == [2]
        assert_held(held_by(run.server, tmp_path / "state"), load_file(output / "final/model.safetensors"))
        assert run.server.post("/collective_rpc", {"method": "reload_weights"}).status_code == 200
        # From the path that it has, which nothing else tells.
        assert [state.version for state in routes.delta_states() or []] == [None]


def test_a_lost_repeated_reordered_or_damaged_delta_is_not_served(run: Run) -> None:
    with run.publishing() as publisher:
        publisher.start(0)
    snapshot = Snapshot(torch.device("cpu"))
    update = Update(snapshot, 0, run.stream.weights())
    update.sum_up()
    files: list[PublishedFile] = []
    for version in (1, 2, 3):
        run.step()
        base = update.checksum
        update = Update(snapshot, version, run.stream.weights())
        update.sum_up()
        label = Label(version=version, checksum=update.checksum, base_version=version - 1, base_checksum=base)
        path, layout = run.directory / delta_name(version), update.choose(whole=False)
        files.append(write_file(path, label, update.shapes, layout, update.parts, mode=0o700))
    before = run.served()

    with VllmConnection(run.server) as routes:

        def refusal(file: PublishedFile) -> str:
            (state,) = routes.delta_prepare(file.name, file.sha256, file.size)
            assert (
                routes.delta_apply(file.name)
                == f"{file.name} is not ready, or not any more; ask for it first"
            )
            return str(state.error)

        def take(file: PublishedFile) -> None:
            (state,) = routes.delta_prepare(file.name, file.sha256, file.size)
            assert state.error is None
            assert routes.delta_apply(file.name) is None

        assert "changes version 1" in refusal(files[1])  # the first is lost, or comes later
        path = run.directory / files[0].name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert "damaged" in refusal(files[0])
        path.unlink()
        assert "No such file" in refusal(files[0])
        assert run.served() == before
        path.write_bytes(content)
        take(files[0])
        once = run.served()
        assert once != before
        assert "changes version 0" in refusal(files[0])  # repeated
        assert run.served() == once
        take(files[1])
        take(files[2])
    assert run.served() == pytest.approx(run.ours(), abs=2e-4)


def test_a_failure_half_way_is_never_served(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with run.publishing(FailsHalfWay) as publisher:
        run.step()
        publisher.start(1)
        monkeypatch.setattr(FailsHalfWay, "fails", True)
        run.step()
        report = publisher.publish(2)
    assert "failed half-way, and needs a full version" in caplog.text
    assert report.attempts == 1
    assert report.verified
    with VllmConnection(run.server) as routes:
        assert [state.version for state in routes.delta_states() or []] == [2]


def test_two_workers_get_their_parts_over_http(
    vllm_model_directory: Path, start_vllm: StartVllm, tmp_path: Path
) -> None:
    port = free_port()
    environment = {
        "PYTHONPATH": PYTHONPATH,
        "ATROPOS_DELTA_TOKEN": SECRET,
        "ATROPOS_DELTA_SOURCE": f"http://127.0.0.1:{port}",
    }
    flags = (*EXTENSION, "--tensor-parallel-size", "2")
    two = start_vllm(vllm_model_directory, flags=flags, environment=environment)
    run = Run(two, tmp_path / "published")
    with run.publishing(delta={"port": port, "token": SECRET}) as publisher:
        publisher.start(0)
        for version in (1, 2, 3):
            run.step()
            assert publisher.publish(version).verified
    assert (run.directory / "v000003.delta.safetensors").exists()
    with VllmConnection(two) as routes:
        states = routes.delta_states() or []
        assert [state.version for state in states] == [3, 3]
    assert run.served() == pytest.approx(run.ours(), abs=2e-4)
    two.close()


def test_a_worker_looks_for_work_less_often_only_while_a_file_is_checked() -> None:
    program = """
import atropos_delta
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

names = SpinCondition.wait.__globals__
look = names["sched_yield"]
with atropos_delta._looking_less_often():
    assert names["sched_yield"] is not look, "vLLM waits in another way now"
    names["sched_yield"]()
assert names["sched_yield"] is look
"""
    command = [str(VLLM_PYTHON), "-c", program]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=120)

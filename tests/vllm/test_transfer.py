"""Weights into a real vLLM by its own weight transfer, and what its classes say to ours.

There is no GPU here: the data goes over TCP instead of NCCL (`cpu_wire`). Everything else is vLLM's own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.compose import ROOT
from tests.ports import free_port
from tests.trainer.runs import rows
from tests.trainer.transfer_stand_in import modules
from tests.vllm.launching import VLLM_PYTHON, VllmServer
from trainer.config import PublishSettings
from trainer.model.base_checkpoint import read_base
from trainer.model.weight_stream import WeightStream
from trainer.publish import ServerFailure, VllmRoutes, score_with_model
from trainer.publish.engines.vllm.nccl_sender import build_engine
from trainer.publish.engines.vllm.nccl_transport import VllmTransferTransport

PROBES = [list(range(20, 60)), list(range(200, 150, -1))]
CLOSE = 2e-4


class Sender:
    """The process that sends, in vLLM's environment."""

    def __init__(self, model: Path, path: Path) -> None:
        self._log = (path / "sender.log").open("w+")
        self._process = subprocess.Popen(
            [str(VLLM_PYTHON), "-m", "tests.vllm.sender_run", str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(with_accelerate(path))},
        )

    def do(self, what: str, **options: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"do": what} | options), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise AssertionError(f"the sender ended:\n{self._log.read()[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def succeed(self, what: str, **options: Any) -> None:
        assert self.do(what, **options) == {}

    def close(self) -> None:
        self._process.communicate(timeout=60)
        self._log.close()


def with_accelerate(path: Path) -> Path:
    """Lend vLLM's environment the one package that it lacks, plain Python, and the trainer's version."""
    site = path / "site"
    site.mkdir()
    packages = Path(accelerate.__file__).parent.parent
    for pattern in ("accelerate", "accelerate-*.dist-info", "atropos_trainer-*.dist-info"):
        (found,) = packages.glob(pattern)
        (site / found.name).symlink_to(found)
    return site


@pytest.fixture(scope="module")
def untied(vllm_model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a head of its own.

    On the CPU vLLM 0.32 computes with a packed copy of the head. Of a head that is tied to the embeddings no
    reload renews that copy, whatever way the weights took.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(vllm_model_directory, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    path = tmp_path_factory.mktemp("untied") / "model"
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(vllm_model_directory).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sender(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sender]:
    process = Sender(untied, tmp_path_factory.mktemp("sender"))
    yield process
    process.close()


@pytest.fixture(scope="module")
def receiver(
    untied: Path,
    start_vllm: Callable[..., VllmServer],
    tmp_path_factory: pytest.TempPathFactory,
) -> VllmServer:
    """A server for transfers, whose worker gets its data over TCP."""
    plugin = tmp_path_factory.mktemp("plugin") / "cpu_wire-1.0.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: cpu-wire\nVersion: 1.0\n")
    (plugin / "entry_points.txt").write_text(
        "[vllm.general_plugins]\ncpu_wire = tests.vllm.cpu_wire:install\n"
    )
    path = ":".join(map(str, (ROOT / "inference_plugins", plugin.parent, ROOT)))
    return start_vllm(
        untied,
        flags=("--weight-transfer-config", '{"backend": "nccl"}'),
        environment={"PYTHONPATH": path},
    )


@pytest.fixture(scope="module")
def contract(sender: Sender) -> dict[str, Any]:
    return sender.do("contract")


def distance(server: VllmServer, model: Path, seed: int | None) -> float:
    """Mean absolute difference, in nats, between the server's log-probs and those of a seed's model."""
    expected: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in expected.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    routes = VllmRoutes(server.url, PublishSettings(transport="nccl", servers=[server.url]))
    routes.wait_until_ready()
    served = torch.tensor(list(chain(*routes.score(PROBES))))
    routes.close()
    ours = torch.tensor(list(chain(*score_with_model(expected, PROBES, "cpu"))))
    return float((served - ours).abs().mean())


def test_vllms_classes_and_ours_agree(contract: dict[str, Any]) -> None:
    assert contract["is_a_source"]
    assert contract["is_a_client"]
    assert contract["grouped"], "vLLM's default batching yields the same names in the same order"
    assert contract["unpacked_equal"], "vLLM's packing takes our stream and gives it back"
    assert len(contract["pieces"]) > 3
    assert "the model is on cpu" in contract["refusal"]
    infos = contract["infos"]
    buffer = infos["nccl"].pop("packed_buffer_size_bytes")
    assert buffer >= 20_000
    assert infos["nccl"] == {
        "rank": 0,
        "master_address": "127.0.0.1",
        "master_port": 7,
        "world_size": 4,
        "packed": True,
        "packed_num_buffers": 2,
    }
    assert infos["ipc"] == {"rank": 0, "packed": True, "packed_buffer_size_bytes": buffer}


def test_our_requests_are_those_of_vllms_own_client(contract: dict[str, Any]) -> None:
    ours, theirs = contract["requests"]["ours"], contract["requests"]["theirs"]
    assert ours == theirs
    assert len(ours) == 8
    assert contract["ipc"]["allowed"], "vLLM reads our handles"
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION=1" in contract["ipc"]["refusal"], (
        "only where pickles are allowed"
    )


@pytest.fixture(scope="module")
def began(sender: Sender, receiver: VllmServer) -> Iterator[Sender]:
    sender.succeed("begin", url=receiver.url, port=free_port(), load_timeout=60.0, pause_timeout=20.0)
    yield sender
    sender.succeed("end")


def test_weights_that_were_sent_are_served(began: Sender, receiver: VllmServer, untied: Path) -> None:
    assert distance(receiver, untied, None) < CLOSE
    began.succeed("connect", seed=1)
    began.succeed("publish", version=1)
    assert distance(receiver, untied, 1) < CLOSE
    assert distance(receiver, untied, None) > 100 * CLOSE
    assert receiver.get("/weight_info").json() == {"weight_version": "1"}
    began.succeed("publish", version=2)  # the same group, once more
    began.succeed("connect", seed=2)  # a new one
    began.succeed("publish", version=3)
    assert distance(receiver, untied, 2) < CLOSE


@pytest.mark.parametrize(
    ("stream", "reason"),
    [("misnamed", "HTTP 500"), ("breaking", "RuntimeError in the sender: CUDA error")],
    ids=["the server refuses a weight", "the sender breaks"],
)
def test_a_transfer_that_failed_leaves_a_server_that_works_and_takes_the_next(
    stream: str, reason: str, began: Sender, receiver: VllmServer, untied: Path
) -> None:
    began.succeed("connect", seed=3, stream=stream)
    answer = began.do("publish", version=4)
    assert answer["error"] == "ServerFailure"
    assert reason in answer["message"]
    assert not receiver.get("/is_paused").json()["is_paused"]
    reply = receiver.post("/v1/completions", {"model": "policy", "prompt": [1, 2, 3], "max_tokens": 4})
    assert reply.status_code == 200, reply.text
    assert "there is no transfer group" in began.do("publish", version=4)["message"]
    began.succeed("connect", seed=4)
    began.succeed("publish", version=5)
    assert distance(receiver, untied, 4) < CLOSE


def test_two_processes_over_which_the_weights_are_spread_send_them_too(
    receiver: VllmServer, untied: Path, free_port: int, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    command = [str(VLLM_PYTHON), "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(free_port), "-m", "tests.vllm.spread_run"]
    command += [str(untied), str(output), "2", "--parallel.mode", "sharded", "--publish.transport", "nccl"]
    command += ["--publish.servers", receiver.url, "--publish.group_port", str(min(free_port + 1, 65000))]
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{with_accelerate(tmp_path)}:{ROOT}"}
    subprocess.run(command, cwd=ROOT, env=environment, timeout=300, check=True)
    published = rows(output, "publish")
    assert [row["version"] for row in published] == [0, 1, 2]
    assert all(row["publish_verified"] is True for row in published)
    assert distance(receiver, output / "final", None) < CLOSE


def test_a_server_without_the_flag_is_told_so(
    vllm_server: VllmServer, vllm_model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, module in modules().items():  # vLLM's sender is not needed for this, only that it waits
        monkeypatch.setitem(sys.modules, name, module)
    model = AutoModelForCausalLM.from_pretrained(vllm_model_directory)
    settings = PublishSettings(transport="nccl", servers=[vllm_server.url])
    stream = WeightStream(model, read_base(str(vllm_model_directory)), bucket_bytes=1 << 20)
    transport = VllmTransferTransport("nccl", stream, settings, build=build_engine)
    routes = VllmRoutes(vllm_server.url, settings)
    assert routes.world_size() == 1
    with pytest.raises(
        ServerFailure, match=r'connect failed.*--weight-transfer-config \'{"backend": "nccl"}\''
    ):
        transport.connect(routes)
    routes.close()
    assert vllm_server.get("/health").status_code == 200

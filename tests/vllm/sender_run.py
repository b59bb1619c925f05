"""The trainer's side of a transfer, in vLLM's own environment, because its sender's classes are there.

Reads one JSON command a line and answers each with one line. Our transport and vLLM's sender are the real
ones; only the wire is TCP (`tests.vllm.cpu_wire`).
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.trainer.inference_stand_in import Answer, StandIn, serving
from tests.vllm.cpu_wire import install
from trainer.config import PublishSettings
from trainer.errors import ConfigurationError, TrainerError
from trainer.model.base_checkpoint import read_base
from trainer.model.weight_stream import WeightEntry, WeightStream
from trainer.publish import VllmRoutes
from trainer.publish.engines.vllm.nccl_sender import (
    SyncClient,
    TransferGroup,
    _init_info,
    _source,
    build_engine,
    require_vllm,
)
from trainer.publish.engines.vllm.nccl_transport import VllmTransferTransport

PACKAGE: Any = importlib.import_module("vllm.distributed.weight_transfer")


def changed_model(directory: str, seed: int) -> Any:
    """The model with every weight moved by some noise; `tests.vllm.test_transfer` makes the same one."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


class BreakingStream(WeightStream):
    """Breaks in the middle, on our side."""

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from islice(super().weights(), len(self.entries()) // 2)
        raise RuntimeError("CUDA error: out of memory, as it were")


class MisnamedStream(WeightStream):
    """Has a name that the server does not know, so that the server breaks off in the middle."""

    def entries(self) -> list[WeightEntry]:
        return [replace(entry, name=self._renamed(entry.name)) for entry in super().entries()]

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in super().weights():
            yield self._renamed(name), tensor

    def _renamed(self, name: str) -> str:
        return name.replace("layers.1.mlp.up_proj", "layers.1.mlp.sideways_proj")


STREAMS = {"good": WeightStream, "breaking": BreakingStream, "misnamed": MisnamedStream}


class Sender:
    """A trainer of one server."""

    def __init__(self, url: str, port: int, **options: Any) -> None:
        self.settings = PublishSettings(transport="nccl", servers=[url], group_port=port, **options)
        self.routes = VllmRoutes(url, self.settings)
        self.connected: VllmTransferTransport | None = None

    def connect(self, model: Any, kind: str) -> None:
        """Begin anew with a model."""
        stream = STREAMS[kind](model, read_base(model.name_or_path), dtype=torch.float32, bucket_bytes=20_000)
        if self.connected is not None:
            self.connected.close([self.routes])
        self.connected = VllmTransferTransport("nccl", stream, self.settings, build=build_engine)
        self.connected.connect(self.routes)

    def publish(self, version: int) -> None:
        """The order of a publish."""
        assert self.connected is not None
        staged = self.connected.capture(version)()
        self.routes.pause()
        try:
            self.connected.load(self.routes, staged)
            self.routes.reset_caches()
            self.routes.tag(version)
        finally:
            self.routes.resume()


def contract(directory: str) -> dict[str, Any]:
    """What vLLM's classes say to ours, without a server."""
    model = changed_model(directory, 1)
    stream = WeightStream(model, read_base(directory), dtype=torch.bfloat16, bucket_bytes=20_000)
    source = _source(PACKAGE, stream)
    engine: Any = importlib.import_module("vllm.distributed.weight_transfer.nccl_engine")
    packing: Any = importlib.import_module("vllm.distributed.weight_transfer.packed_tensor")
    checked = engine.NCCLTrainerWeightTransferEngine._checked_iter
    unpacked: dict[str, torch.Tensor] = {}
    sizes = []
    pairs = checked(source, source.metadata())
    while (piece := packing.pack_tensors(pairs, lambda item: item[1], 20_000)) is not None:
        sizes.append(piece.packed_tensor.numel())
        parts = packing.unpack_tensor(
            piece.packed_tensor, piece.names, piece.shapes, piece.dtypes, piece.tensor_sizes
        )
        unpacked |= dict(parts)
    expected = dict(stream.weights())
    grouped = [name for names, _ in source.iter_groups() for name in names]
    server: Any = None
    group = {"client": SyncClient(server), "stream": stream, "workers": 3, "address": "127.0.0.1", "port": 7}
    infos = {
        backend: vars(_init_info(TransferGroup(backend=backend, **group)))  # type: ignore[arg-type]  # two literals
        for backend in ("nccl", "ipc")
    }
    try:
        require_vllm("nccl", torch.device("cpu"))
        refusal = ""
    except ConfigurationError as error:
        refusal = str(error)
    require_vllm("nccl", torch.device("cuda", 0))  # vLLM is here, and has what it takes
    return {
        "is_a_source": isinstance(source, PACKAGE.WeightSource),
        "is_a_client": isinstance(SyncClient(server), PACKAGE.VLLMWeightSyncClient),
        "unpacked_equal": unpacked.keys() == expected.keys()
        and all(torch.equal(unpacked[name], expected[name]) for name in expected),
        "pieces": sizes,
        "grouped": grouped == [entry.name for entry in stream.entries()],
        "infos": infos,
        "refusal": refusal,
        "requests": recorded_requests(),
        "ipc": ipc_update(),
    }


class Recorder(StandIn):
    """Says yes to everything, and remembers it."""

    def __init__(self) -> None:
        super().__init__((0.0, 0.0))
        self.requests: list[Any] = []

    def answer(self, path: str, body: bytes) -> Answer:
        self.requests.append([path, json.loads(body) if body else None])
        return 200, None


def recorded_requests() -> dict[str, list[Any]]:
    """What vLLM's own HTTP client sends, and what ours does, for the same calls."""
    handles = {"GPU-0": ("rebuild", 1, None)}
    update = {"names": ["w"], "dtype_names": ["bfloat16"], "shapes": [[2, 3]]}
    result = {}
    for name in ("theirs", "ours"):
        server = Recorder()
        with serving(server):
            client: Any = PACKAGE.HTTPVLLMWeightSyncClient(server.url)
            if name == "ours":
                settings = PublishSettings(transport="nccl", servers=[server.url])
                client = SyncClient(VllmRoutes(server.url, settings))
            client.init_weight_transfer_engine({"packed": True})
            client.start_weight_update()
            client.update_weights(update)
            client.update_weights(update | {"ipc_handles": handles, "tensor_sizes": [12]})
            client.update_weights([update, update])
            client.finish_weight_update()
            client.finish_weight_update("7")
            client.shutdown_weight_transfer_engine()
        result[name] = server.requests
    return result


def ipc_update() -> dict[str, Any]:
    """Whether vLLM's worker reads our handles, and only where pickles are allowed."""
    engine: Any = importlib.import_module("vllm.distributed.weight_transfer.ipc_engine")
    from trainer.publish.engines.vllm.nccl_sender import _for_json

    handles = {"GPU-0": ("rebuild", 1, None)}
    sent = {"names": ["w"], "dtype_names": ["bfloat16"], "shapes": [[2, 3]], "tensor_sizes": [12]}
    body = json.loads(json.dumps(_for_json(sent | {"ipc_handles": handles, "ipc_handles_pickled": None})))
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    allowed = engine.IPCWeightTransferUpdateInfo(**body).ipc_handles == handles
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "0"
    try:
        engine.IPCWeightTransferUpdateInfo(**body)
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    return {"allowed": allowed, "refusal": refusal}


def main() -> None:
    directory = sys.argv[1]
    sender: Sender | None = None
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            match command.pop("do"):
                case "contract":
                    answer = contract(directory)
                case "begin":
                    install()
                    sender = Sender(**command)
                case "connect":
                    assert sender is not None
                    model = changed_model(directory, command["seed"])
                    sender.connect(model, command.get("stream", "good"))
                case "publish":
                    assert sender is not None
                    sender.publish(command["version"])
                case "end":
                    assert sender is not None
                    assert sender.connected is not None
                    sender.connected.close([sender.routes])
                    sender.routes.close()
        except TrainerError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(answer), flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    sys.stdout = os.fdopen(os.dup(1), "w")  # vLLM logs to the standard output: send that to the errors
    os.dup2(2, 1)
    main()

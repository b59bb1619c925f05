"""vLLM's side of a weight transfer without a GPU: the sender's classes, and a server whose workers receive.

The sender keeps the order and the interface of vLLM 0.32 (`vllm.distributed.weight_transfer`); what NCCL and
CUDA do there, a queue in this process does here. The real classes are put to the test in `tests/vllm`.
"""

from __future__ import annotations

import base64
import json
import pickle
import queue
import socket
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.trainer.inference_stand_in import Answer, StandIn, serving
from trainer.launch import launched_rank
from trainer.publish.engines.vllm import nccl_transport

PACKAGE = "vllm.distributed.weight_transfer"
CARRIED: dict[str, list[torch.Tensor]] = {}
"""What an ipc handle points to: memory that both sides see."""


class Wire:
    """One group's rendezvous and its broadcasts, known by the rendezvous' port."""

    known: ClassVar[dict[int, Wire]] = {}

    def __init__(self, address: str, port: int) -> None:
        self.listener = socket.create_server((address, port))  # held until the group is left
        self.joined = threading.Event()
        self.tensors: queue.Queue[torch.Tensor | None] = queue.Queue()
        self.known[port] = self

    def leave(self) -> None:
        self.listener.close()
        self.tensors.put(None)


@dataclass(frozen=True)
class ParamMeta:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightSource(ABC):
    @abstractmethod
    def metadata(self) -> list[ParamMeta]: ...

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...


@dataclass
class NCCLTrainerInitInfo:
    master_address: str
    master_port: int
    world_size: int
    packed: bool = True
    packed_buffer_size_bytes: int = 1 << 30
    rank: int = field(kw_only=True)


@dataclass
class IPCTrainerInitInfo:
    packed: bool = False
    packed_buffer_size_bytes: int = 1 << 30
    rank: int = field(kw_only=True)


class NCCLEngine:
    """Sends through the wire while the server takes from it."""

    built: ClassVar[list[NCCLEngine]] = []
    sending: ClassVar[list[int]] = [0, 0]
    """Engines that are sending now, and the most that ever were at once."""

    def __init__(self, info: NCCLTrainerInitInfo, client: Any, source: WeightSource) -> None:
        self.info, self.client, self.source = info, client, source
        self.hang: threading.Event | None = None
        """Where the first broadcast waits for ever, or until it is set."""
        self.left = threading.Event()
        self.built.append(self)
        with ThreadPoolExecutor(1) as pool:
            payload = {
                "master_address": info.master_address,
                "master_port": info.master_port,
                "rank_offset": 1,
                "world_size": info.world_size,
                "packed": info.packed,
                "packed_buffer_size_bytes": info.packed_buffer_size_bytes,
            }
            self.wire = Wire(info.master_address, info.master_port)
            joining = pool.submit(client.init_weight_transfer_engine, payload)
            self.wire.joined.wait(20)
            joining.result()

    def send_weights(self) -> None:
        metadata = self.source.metadata()
        update = {
            "names": [entry.name for entry in metadata],
            "dtype_names": [str(entry.dtype).split(".")[-1] for entry in metadata],
            "shapes": [list(entry.shape) for entry in metadata],
        }
        self.client.start_weight_update()
        self.sending[0] += 1
        self.sending[1] = max(self.sending)
        pool = ThreadPoolExecutor(1)
        try:
            receiving = pool.submit(self.client.update_weights, update)
            for _name, tensor in self.source:
                if self.hang is not None:
                    self.hang.wait(20)
                self.wire.tensors.put(tensor.clone())
            receiving.result()
        finally:
            self.sending[0] -= 1
            pool.shutdown(wait=False)
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        self.wire.leave()
        self.left.set()


class IPCEngine:
    """Lays every piece where the server sees it and tells it where."""

    def __init__(self, info: IPCTrainerInitInfo, client: Any, source: WeightSource) -> None:
        self.info, self.client, self.source = info, client, source
        client.init_weight_transfer_engine({"packed": info.packed})

    def send_weights(self) -> None:
        self.client.start_weight_update()
        for name, tensor in self.source:
            CARRIED["piece"] = [tensor.clone()]
            self.client.update_weights(
                {
                    "names": [name],
                    "dtype_names": [str(tensor.dtype).split(".")[-1]],
                    "shapes": [list(tensor.shape)],
                    "ipc_handles": {"GPU-0": ("piece", 0)},
                    "ipc_handles_pickled": None,
                    "tensor_sizes": [tensor.nbytes],
                }
            )
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        pass


class WeightTransferTrainerFactory:
    @classmethod
    def trainer_init(cls, info: Any, *, client: Any, source: WeightSource) -> Any:
        return (IPCEngine if isinstance(info, IPCTrainerInitInfo) else NCCLEngine)(info, client, source)


def modules() -> dict[str, ModuleType]:
    """The package, as `sys.modules` would hold it."""
    this = sys.modules[__name__]
    package, nccl, ipc = (ModuleType(PACKAGE + end) for end in ("", ".nccl_engine", ".ipc_engine"))
    for name in ("ParamMeta", "WeightSource", "WeightTransferTrainerFactory"):
        setattr(package, name, getattr(this, name))
    nccl.NCCLTrainerInitInfo = NCCLTrainerInitInfo  # type: ignore[attr-defined]  # a module made here
    ipc.IPCTrainerInitInfo = IPCTrainerInitInfo  # type: ignore[attr-defined]  # a module made here
    found = {module.__name__: module for module in (package, nccl, ipc)}
    return found | {"vllm": ModuleType("vllm"), "vllm.distributed": ModuleType("vllm.distributed")}


class Receiver(StandIn):
    """A server with one worker, whose model is a real one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__((0.0, 0.0))
        self.model = model
        self.workers = 1
        self.updating = False
        self.half_done = False
        """An update has begun and not been finished: the model cannot be used."""
        self.init_info: dict[str, Any] = {}
        self.joins = True
        self.refuse_weight: Callable[[str], bool] = lambda _name: False

    def answer(self, path: str, body: bytes) -> Answer:
        content = json.loads(body) if body else {}
        match path:
            case "/get_world_size":
                return 200, {"world_size": self.workers}
            case "/init_weight_transfer_engine":
                self.init_info = content["init_info"]
                if "master_port" in self.init_info:
                    if not self.joins:
                        return self.hang()
                    Wire.known[self.init_info["master_port"]].joined.set()
            case "/shutdown_weight_transfer_engine":
                if self.updating:
                    return 500, {
                        "error": {"message": "Cannot release a trainer connection during a weight update"}
                    }
            case "/start_weight_update":
                if self.updating:
                    return 500, {"error": {"message": "a weight update is already active"}}
                self.updating = self.half_done = True
            case "/update_weights":
                return self.update(content["update_info"])
            case "/finish_weight_update":
                if not self.updating:
                    return 500, {"error": {"message": "without a matching start_weight_update"}}
                self.updating = self.half_done = False
            case _:
                return super().answer(path, body)
        return 200, {"message": "done"}

    def update(self, info: dict[str, Any]) -> Answer:
        weights = self.model.state_dict()
        for name, dtype_name, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            tensor = self.receive(info)
            if tensor is None or self.refuse_weight(name):
                self.updating = False
                return 500, {"error": {"message": f"{name}: the group is gone, or no such weight"}}
            assert str(tensor.dtype) == f"torch.{dtype_name}"
            assert list(tensor.shape) == shape
            with torch.no_grad():
                weights[name].copy_(tensor)
        return 200, {"message": "done"}

    def receive(self, info: dict[str, Any]) -> torch.Tensor | None:
        if "ipc_handles_pickled" in info:
            handles = pickle.loads(base64.b64decode(info["ipc_handles_pickled"]))  # noqa: S301 - our own
            place, number = handles["GPU-0"]
            return CARRIED[place][number]
        return Wire.known[self.init_info["master_port"]].tensors.get(timeout=20)


@contextmanager
def served_by_process_0(model: Path, sign: Path) -> Iterator[tuple[str, Receiver | None]]:
    """A server's URL, in every process of a run, and the server itself, with the model, in the first one.

    It takes weights by this module's classes. `sign` is a file that is not there yet.
    """
    sys.modules.update(modules())
    nccl_transport.require_vllm = lambda *_: None  # type: ignore[assignment]  # there is no GPU
    if launched_rank():
        while not sign.exists():
            time.sleep(0.01)
        yield sign.read_text(), None
        return
    server = Receiver(AutoModelForCausalLM.from_pretrained(model))
    with serving(server):
        written = sign.with_suffix(".new")
        written.write_text(server.url)
        written.rename(sign)
        yield server.url, server

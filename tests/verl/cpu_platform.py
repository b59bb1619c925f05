"""The CPU as a platform of verl, which has none of its own; loaded by VERL_USE_EXTERNAL_MODULES."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, set_platform

RESOURCE = "GPU"
"""What verl asks Ray for, one a worker; nothing of it is used."""

_DEVICE = SimpleNamespace(
    **{
        name: getattr(torch.cpu, name)
        for name in ("current_device", "device_count", "synchronize", "set_device")
    },
    is_available=lambda: True,
    get_device_name=lambda *_: "CPU",
    empty_cache=lambda: None,
    ipc_collect=lambda: None,
    manual_seed=torch.manual_seed,
    manual_seed_all=torch.manual_seed,
    memory_allocated=lambda *_: 0,
    memory_reserved=lambda *_: 0,
    max_memory_allocated=lambda *_: 0,
    max_memory_reserved=lambda *_: 0,
    reset_peak_memory_stats=lambda *_: None,
    mem_get_info=lambda *_: (1, 1),
    get_rng_state=torch.get_rng_state,
    set_rng_state=torch.set_rng_state,
)


class CpuPlatform(PlatformBase):
    device_name = "cpu"
    vendor_name = "cpu"
    device_module: Any = _DEVICE

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CPU_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def ray_resource_name(self) -> str:
        return RESOURCE

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


def _init_process_group(backend: str | None = None, **arguments: Any) -> None:
    """verl asks for a backend of the host and one of the device, which here are one device."""
    _REAL_INIT(backend="cpu:gloo" if backend == "cpu:gloo,cpu:gloo" else backend, **arguments)


def _pinned_already(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    """verl keeps its reference in pinned memory, which only an accelerator has."""
    return tensor


_REAL_INIT = torch.distributed.init_process_group
torch.distributed.init_process_group = _init_process_group
torch.Tensor.pin_memory = _pinned_already  # type: ignore[method-assign, assignment]
set_platform(CpuPlatform())
os.environ["VERL_ENGINE_DEVICE"] = "cuda"  # its FSDP2 engine is registered for that; it runs on any device

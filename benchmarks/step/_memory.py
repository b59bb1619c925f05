"""Peak memory of a step: above what the process held before it, and in all."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Peak", "PeakMemory"]

_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""Written to the kernel to set the peak of the resident set (VmHWM) to the present value."""


@dataclass(frozen=True)
class Peak:
    """Bytes; None where this system cannot tell."""

    above_start: int | None
    total: int | None


class PeakMemory:
    """Measures between `start` and `stop`.

    On a CUDA device by torch's own count of allocated memory. On the CPU by the kernel's count of the
    process's resident memory, after everything free was given back to it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: int | None = None

    def start(self) -> None:
        """Give back what is free, and count from here."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return
        _trim()
        self._count_from_here()

    def restart(self) -> Peak:
        """The peak since `start`, on the CPU; count from here, giving nothing back."""
        peak = self.stop()
        self._count_from_here()
        return peak

    def _count_from_here(self) -> None:
        try:
            _CLEAR_REFS.write_text(_RESET_PEAK)
            self._before = _status("VmRSS")
        except OSError:
            self._before = None

    def stop(self) -> Peak:
        """The peak since `start`."""
        if self._before is None:
            return Peak(None, None)
        total = torch.cuda.max_memory_allocated() if self._device.type == "cuda" else _status("VmHWM")
        return Peak(total - self._before, total)


def _trim() -> None:
    """Let the C library return its free memory; it keeps some for the next allocation otherwise."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library: the numbers are a little less sharp


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")

"""Describes the machine of a benchmark's numbers, for its JSON and its last line."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

__all__ = ["describe", "machine", "package_version"]


def machine(device: str = "cpu") -> dict[str, Any]:
    """Hardware, library versions and date.

    Args:
        device: `cuda` adds the accelerator's name and memory.
    """
    about = {
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "date": datetime.now(UTC).date().isoformat(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about["accelerator"] = properties.name
        about["accelerator_memory_gib"] = round(properties.total_memory / 2**30, 1)
        about["cuda"] = torch.version.cuda
    return about


def describe(about: dict[str, Any]) -> str:
    """One line: the machine, torch's version, the date."""
    accelerator = f"{about['accelerator']}, " if "accelerator" in about else ""
    return (
        f"{accelerator}{about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB, "
        f"torch {about['torch']}, {about['date']}"
    )


def package_version(name: str) -> str | None:
    """The installed version of a distribution; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line for line in lines if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()

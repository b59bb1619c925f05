"""The largest model that a GPU trains, by arithmetic: bytes for each parameter, and what comes on top.

    python -m benchmarks.largest_model

Nothing here is measured on a GPU. Counted for P parameters:

- weights, gradients and the two moments of AdamW, as the settings have them (see `bytes_per_parameter`, which
  a test compares with a run on the CPU); under LoRA the frozen weights, and for the adapters 16 bytes;
- float32 weights also as bfloat16, which autocast makes for the passes: 2 bytes, of frozen ones for a layer;
- where weights are spread over N GPUs, an Nth of the former, and the gathered weights and gradients of two
  layers and of the autocast copy of one;
- activations of a micro-batch of 8,192 tokens, recomputed: the input of each layer, and 34 numbers of 2 bytes
  for each of a layer's hidden units; a dense model of L layers has the hidden size 100 L;
- 2 GB for CUDA, and what its allocator cannot use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from rich.console import Console
from rich.table import Table

GPUS: Final = (24, 40, 80, 141)
"""GB of memory."""
TOKENS: Final = 8192
ADAPTERS: Final = 0.0054
"""Parameters of adapters of rank 16 on all linear layers, as a share of the weights: that of Qwen3-8B."""
_LAYER: Final = 34
_CUDA: Final = 2e9
_BLOCK: Final = 256

KINDS: Final[dict[str, tuple[str, str]]] = {
    "float32": ("float32", "float32"),
    "8-bit states": ("float32", "8bit"),
    "bfloat16 weights": ("bfloat16", "float32"),
    "both": ("bfloat16", "8bit"),
}
"""`model.dtype` and `optimizer.states`."""


def main() -> None:
    """Print the table."""
    table = Table("", "settings", "bytes a parameter", *(f"{size} GB" for size in GPUS))

    def add(where: str, settings: str, dtype: str, states: str, processes: int, lora: bool) -> None:
        each = bytes_per_parameter(dtype, states, lora=lora)
        sizes = [
            largest(lambda count: needed(count, dtype, states, processes=processes, lora=lora), size * 1e9)
            for size in GPUS
        ]
        table.add_row(where, settings, f"{each:.1f}", *(f"{size / 1e9:.1f}B" for size in sizes))

    for where, processes in (("one GPU", 1), ("each of 8, sharded", 8)):
        for kind, (dtype, states) in KINDS.items():
            add(where, kind, dtype, states, processes, False)
    for dtype in ("float32", "bfloat16"):
        add("one GPU, LoRA", f"{dtype} base", dtype, "float32", 1, True)
    Console(width=110).print(table)


def bytes_per_parameter(dtype: str, states: str, *, lora: bool = False) -> float:
    """Bytes of weights, gradients and moments for each parameter of the model.

    Args:
        dtype: `model.dtype`.
        states: `optimizer.states`.
        lora: Only adapters are trained, in float32.
    """
    weight = 4 if dtype == "float32" else 2
    moments = 8.0 if states == "float32" else 2 * (1 + 4 / _BLOCK)
    if lora:
        return weight + ADAPTERS * (4 + 4 + moments)
    return weight + weight + moments


def needed(parameters: float, dtype: str, states: str, *, processes: int = 1, lora: bool = False) -> float:
    """Bytes that each GPU needs, see above."""
    each = bytes_per_parameter(dtype, states, lora=lora)
    weight = 4 if dtype == "float32" else 2
    autocast = 2 if dtype == "float32" else 0
    layers = (parameters / (12 * 100**2)) ** (1 / 3)
    layer, hidden = parameters / layers, 100 * layers
    if processes == 1:
        held = each * parameters + autocast * (layer if lora else parameters)
    else:
        held = each * parameters / processes + (2 * 2 * weight + autocast) * layer
    activations = TOKENS * hidden * (layers * weight + _LAYER * 2)
    return held + activations + _CUDA


def largest(need: Callable[[float], float], memory: float) -> float:
    """Return the number of parameters that needs so many bytes, by bisection of its logarithm."""
    low, high = math.log(1e6), math.log(1e13)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if need(math.exp(middle)) <= memory else (low, middle)
    return math.exp(low)


if __name__ == "__main__":
    main()

"""Measures what a model does to its head's output before it calls it logits: a scale, a soft cap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# The first is small enough that no cap bends it, the second large enough that every cap is reached.
_PROBES = (2.0**-20, 2.0**40, 0.0, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0, 10.0, -10.0, 30.0, -30.0, 100.0, -100.0)


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """`scale * x`, or soft-capped, `cap * tanh(scale * x / cap)`, for a head's output `x`."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, output: Tensor) -> Tensor:
        """Logits for a head's output, of any shape."""
        if self.cap is not None:
            return torch.tanh(output * (self.scale / self.cap)) * self.cap
        return output * self.scale


@torch.no_grad()
def measure_transform(inner: nn.Module, inputs: dict[str, Any]) -> LogitTransform:
    """Find a model's transform by giving it chosen numbers in place of its head's output.

    Models name their scales and caps differently (`logit_scale`, `logits_scaling`, `lm_head_multiplier`,
    `final_logit_softcapping`...), and some divide where others multiply; what they do can be observed.

    Args:
        inner: A causal language model of transformers, unwrapped.
        inputs: Keyword arguments of its forward, for a short input.

    Raises:
        ValueError: The model does something else to its logits, or does not call its head.
    """
    probes = torch.tensor(_PROBES, dtype=torch.float64)

    called: list[nn.Module] = []

    def put_probes(module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        called.append(module)
        repeats = -(-output.shape[-1] // len(probes))
        row = probes.repeat(repeats)[: output.shape[-1]].to(output.device)
        return row.expand(output.shape)

    head: nn.Module = inner.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_hook(put_probes)
    try:
        logits = inner(**inputs).logits.double().cpu()  # [B, T, V]
    finally:
        handle.remove()
    if not called:
        raise ValueError("the model does not call its head")
    found = logits[0, 0]
    expected = probes.repeat(-(-len(found) // len(probes)))[: len(found)]
    scale = float(found[0] / expected[0])
    linear = abs(float(found[1]) - scale * float(expected[1])) <= 1e-5 * abs(scale * float(expected[1]))
    transform = LogitTransform(scale=scale, cap=None if linear else float(found[1]))
    if not scale > 0 or not torch.allclose(transform(expected[None]).expand_as(logits), logits, rtol=1e-5):
        raise ValueError("the model changes its head's output in a way that is no scale and no soft cap")
    return transform

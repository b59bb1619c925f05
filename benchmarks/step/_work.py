"""Counts the arithmetic of a step: for MFU, the share of a device's peak that does useful work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["KNOWN_PEAKS", "PRIME_RL", "Arithmetic", "arithmetic_of", "peak_flops_of"]

KNOWN_PEAKS = {
    # Dense bfloat16, without sparsity, from the vendor's data sheets.
    "H100 80GB HBM3": 989e12,
    "H100 SXM": 989e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "A100": 312e12,
}

PRIME_RL = {"tokens_per_second": 11_900.0, "mfu": 0.111, "peak_gib": 12.5}
"""Published by prime-rl: Qwen3-0.6B, full fine-tuning, bf16, activation recomputation, one H100."""


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Cost of one token, one prediction and one attended pair in the forward pass, in FLOP."""

    per_token: float
    """2 x the weights of the decoder layers' matrices (and nothing else: no embedding, no norms)."""
    per_prediction: float
    """2 x hidden size x vocabulary: the head, where it is applied."""
    per_pair: float
    """4 x layers x heads x head size: scores and weighted values, for each token and each it attends to."""

    def step(self, counts: dict[str, int]) -> float:
        """FLOP of an exact step: forward, and twice as much for the backward pass.

        Counted once per unique token, prediction and pair that the batch needs; recomputed activations,
        padding and repeated prompts count for nothing.
        """
        forward = (
            self.per_token * counts["unique_tokens"]
            + self.per_prediction * counts["predictions"]
            + self.per_pair * counts["attended_pairs"]
        )
        return 3.0 * forward


def arithmetic_of(model: Any) -> Arithmetic:
    """Read it off a causal language model of transformers (unwrapped, dense)."""
    config = model.config
    head = model.get_output_embeddings()
    in_layers = sum(
        parameter.numel()
        for name, parameter in model.base_model.named_parameters()
        if parameter.ndim == 2 and ".layers." in f".{name}"
    )
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Arithmetic(
        per_token=2.0 * in_layers,
        per_prediction=2.0 * head.weight.numel(),
        per_pair=4.0 * config.num_hidden_layers * config.num_attention_heads * head_size,
    )


def peak_flops_of(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by its name; None if it is not known here."""
    for name, peak in KNOWN_PEAKS.items():
        if name in device_name:
            return peak
    return None

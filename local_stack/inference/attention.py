"""Attention of a batch without padding, over the key/value pool.

A forward pass runs on the tokens of many sequences laid end to end, `[1, T]`; everything but attention is
per-token and needs to know nothing of it. A *plan* travels through the model's keyword arguments and tells
the attention function which token belongs where: it stores the new keys and values in the pool and attends
per sequence. `T` tokens, `R` rows, `H` query heads, `K` key/value heads, `D` head size, `L` columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from local_stack.inference.errors import UnsupportedModel
from local_stack.inference.kv_pool import KeyValuePool

IMPLEMENTATION = "atropos_packed"
"""The name under which `packed_attention` is registered with transformers."""


class Plan(Protocol):
    """Where the tokens of one forward pass belong."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Store keys and values, attend: [1, H, T, D], [1, K, T, D] twice -> [1, T, H, D]."""
        ...


@dataclass(frozen=True)
class Piece:
    """Tokens `start .. stop-1` of the sequence in the pool's row `row`."""

    row: int
    start: int
    stop: int


class PrefillPlan:
    """Several tokens of each of a few rows; earlier columns of these rows are already in the pool."""

    def __init__(self, pool: KeyValuePool, pieces: Sequence[Piece]) -> None:
        self._pool = pool
        self._pieces = pieces

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See `Plan`."""
        groups = query.shape[1] // key.shape[1]
        outputs = []
        first = 0
        for piece in self._pieces:
            last = first + piece.stop - piece.start
            keys = self._pool.keys[layer, piece.row : piece.row + 1]
            values = self._pool.values[layer, piece.row : piece.row + 1]
            keys[:, :, piece.start : piece.stop] = key[:, :, first:last]
            values[:, :, piece.start : piece.stop] = value[:, :, first:last]
            outputs.append(
                scaled_dot_product_attention(
                    query[:, :, first:last],
                    keys[:, :, : piece.stop].repeat_interleave(groups, dim=1),
                    values[:, :, : piece.stop].repeat_interleave(groups, dim=1),
                    attn_mask=_causal_from(piece.start, piece.stop),
                    is_causal=piece.start == 0,
                    scale=scale,
                )
            )
            first = last
        return torch.cat(outputs, dim=2).transpose(1, 2)


class DecodePlan:
    """One token of every row of the pool, in row order."""

    def __init__(self, pool: KeyValuePool) -> None:
        self._pool = pool
        self._rows = torch.arange(pool.rows)
        self.columns = torch.tensor(pool.lengths)
        """[R] where each row's token goes; also its position."""
        self._longest = max(pool.lengths) + 1
        masked = torch.arange(self._longest)[None, :] > self.columns[:, None]
        bias = torch.zeros(masked.shape, dtype=pool.keys.dtype).masked_fill_(masked, -torch.inf)
        self._bias = bias[:, None, None, :]  # [R, 1, 1, L]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See `Plan`."""
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        keys[self._rows, :, self.columns] = key[0].transpose(0, 1)  # [R, K, D]
        values[self._rows, :, self.columns] = value[0].transpose(0, 1)
        rows, heads, size = self._pool.rows, key.shape[1], key.shape[3]
        # The query heads that share a key/value head stand where several queries would: keys are not copied.
        grouped = query[0].transpose(0, 1).reshape(rows, heads, -1, size)
        output = scaled_dot_product_attention(
            grouped,
            keys[:rows, :, : self._longest],
            values[:rows, :, : self._longest],
            attn_mask=self._bias,
            scale=scale,
        )  # [R, K, H / K, D]
        return output.reshape(1, rows, -1, size)


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    plan: Plan,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls in every layer; see the module's docstring.

    `sliding_window` needs nothing here: the longest sequence is kept within it when the model is loaded.
    """
    if softcap is not None or s_aux is not None:
        raise UnsupportedModel("this model's attention (soft-capped or with sinks) is not supported")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return plan.attend(module.layer_idx, query, key, value, scale), None


def _causal_from(start: int, stop: int) -> torch.Tensor | None:
    """[stop - start, stop], True where a token may look; None where the built-in triangle says the same."""
    if start == 0:
        return None
    return torch.arange(stop)[None, :] <= torch.arange(start, stop)[:, None]

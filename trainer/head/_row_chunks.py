"""A head that is more than a matrix (adapters, quantized weights): a chunk of rows at a time.

The module is called as it is, and called again in the backward pass, so that one chunk's logits live at a
time. Where the weight itself is trained, every chunk makes a gradient of the weight's size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.head._scores import HeadScores, score_logits
from trainer.head._transform import LogitTransform

_ELEMENTS_PER_CHUNK = 1 << 23
"""Logits in one chunk; its float32 temporaries, about five of them, then stay below 200 MiB."""


def row_chunk_scores(
    module: nn.Module,
    hidden: Tensor,
    rows: Tensor,
    targets: Tensor,
    *,
    vocabulary: int,
    temperature: Tensor | None = None,
    transform: LogitTransform | None = None,
    top_k: int = 0,
    rows_per_chunk: int | None = None,
) -> HeadScores:
    """Score targets under any head module; arguments as `tiled_scores` takes them.

    Args:
        module: Gives [1, R, V] for [1, R, H].
        hidden: [U, H].
        rows: [N] int64, in [0, U).
        targets: [N] int64, in [0, V).
        vocabulary: V, to size the chunks.
        temperature: [U], or None for 1.
        transform: What the model does to the head's output. None: nothing.
        top_k: How many of each row's likeliest tokens to name.
        rows_per_chunk: None: as many as `_ELEMENTS_PER_CHUNK` allows.
    """
    transform = transform or LogitTransform()
    size = rows_per_chunk or max(1, _ELEMENTS_PER_CHUNK // vocabulary)
    order = rows.argsort(stable=True)
    starts = torch.arange(0, len(hidden) + size, size, device=rows.device)
    bounds = torch.searchsorted(rows[order], starts).tolist()

    def score(part: Tensor, heat: Tensor | None, part_rows: Tensor, part_targets: Tensor) -> HeadScores:
        logits = transform(module(part[None])[0], heat)
        return score_logits(logits, part_rows, part_targets, top_k=top_k)

    scores: list[HeadScores] = []
    for index, start in enumerate(range(0, len(hidden), size)):
        entries = order[bounds[index] : bounds[index + 1]]
        heat = None if temperature is None else temperature[start : start + size]
        part = hidden[start : start + size]
        found: HeadScores = checkpoint(
            score, part, heat, rows[entries] - start, targets[entries], use_reentrant=False
        )
        scores.append(found)
    top_ids = [score.top_ids for score in scores if score.top_ids is not None]
    top_logprobs = [score.top_logprobs for score in scores if score.top_logprobs is not None]
    place = order.argsort()  # where each entry went
    return HeadScores(
        logprobs=torch.cat([score.logprobs for score in scores]).index_select(0, place),
        entropy=torch.cat([score.entropy for score in scores]),
        top_ids=torch.cat(top_ids) if top_ids else None,
        top_logprobs=torch.cat(top_logprobs) if top_logprobs else None,
    )

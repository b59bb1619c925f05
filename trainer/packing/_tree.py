"""One row of tokens in depth-first order: a forest of prefix trees, or sequences end to end."""

from __future__ import annotations

import numpy as np
import torch

from trainer.packing._arrays import Integers
from trainer.packing._cost import PassCost, visible_pairs
from trainer.packing._micro_batch import MicroBatch, Packing
from trainer.packing._sorting import SortedSamples


def fold(batch: SortedSamples, chosen: Integers, *, packing: Packing, cost: PassCost) -> MicroBatch:
    """Fold the chosen samples into one row: each adds only the tokens it does not share with the one before.

    Args:
        batch: The step's samples; if they share nothing, the row holds them end to end.
        chosen: Positions in `batch`, rising.
        packing: What to call it.
        cost: To estimate the pass.
    """
    shared = batch.shared_within(chosen)
    lengths = batch.lengths[chosen]
    total = int((lengths - shared).sum())
    input_ids = np.empty(total, dtype=np.int64)
    position_ids = np.empty(total, dtype=np.int64)
    subtree_end = np.full(total, total, dtype=np.int64)
    path = np.empty(int(lengths.max()), dtype=np.int64)  # columns of the current sample's tokens
    depths = np.arange(int(lengths.max()), dtype=np.int64)
    predict_from: list[Integers] = []  # columns, of each sample in turn
    used = previous = 0
    for index, length, start in zip(chosen.tolist(), lengths.tolist(), shared.tolist(), strict=True):
        # The sample before is left at the branch point: the subtrees of what it does not share end here.
        subtree_end[path[start:previous]] = used
        stop = used + length - start
        input_ids[used:stop] = batch.tokens[index][start:]
        position_ids[used:stop] = depths[start:length]
        path[start:length] = np.arange(used, stop)
        predict_from.append(path[batch.trained_tokens.position_of(index) - 1])
        used, previous = stop, length
    columns = np.concatenate(predict_from)
    pairs = visible_pairs(lengths, shared)
    return MicroBatch(
        packing=packing,
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        subtree_end=torch.from_numpy(subtree_end),
        attention_mask=None,
        sequence_tokens=int(lengths.sum()),
        longest_sequence=len(path),
        padding_tokens=0,
        cost=cost.of(tokens=total, pairs=pairs, trained=float(batch.trained[chosen].sum())),
        **batch.trained_tokens.of_micro_batch(chosen, rows=np.zeros_like(columns), columns=columns),
    )

"""One row a sequence, filled up to the longest."""

from __future__ import annotations

import numpy as np
import torch

from trainer.packing._arrays import Integers
from trainer.packing._cost import PassCost
from trainer.packing._micro_batch import MicroBatch
from trainer.packing._sorting import SortedSamples


def pad(batch: SortedSamples, chosen: Integers, *, cost: PassCost) -> MicroBatch:
    """Give each of the chosen samples a row of its own."""
    lengths = batch.lengths[chosen]
    shape = (len(chosen), int(lengths.max()))
    input_ids = np.zeros(shape, dtype=np.int64)
    for row, index in enumerate(chosen):
        input_ids[row, : lengths[row]] = batch.tokens[index]
    is_token = np.arange(shape[1]) < lengths[:, None]  # [B, T]
    positions = [batch.trained_tokens.position_of(int(index)) for index in chosen]
    return MicroBatch(
        packing="padded",
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(np.tile(np.arange(shape[1]), (shape[0], 1))),
        subtree_end=None,
        attention_mask=torch.from_numpy(is_token.astype(np.int64)),
        sequence_tokens=int(lengths.sum()),
        longest_sequence=shape[1],
        padding_tokens=int(is_token.size - lengths.sum()),
        cost=padded_cost(batch, chosen, cost),
        **batch.trained_tokens.of_micro_batch(
            np.asarray(chosen),
            rows=np.repeat(np.arange(len(chosen)), [len(each) for each in positions]),
            columns=np.concatenate(positions) - 1,
        ),
    )


def padded_cost(batch: SortedSamples, chosen: Integers, cost: PassCost) -> float:
    """The cost of the chosen samples, padding included."""
    longest = int(batch.lengths[chosen].max())
    return cost.of(
        tokens=len(chosen) * longest,
        pairs=len(chosen) * longest * (longest + 1) / 2,
        trained=float(batch.trained[chosen].sum()),
    )

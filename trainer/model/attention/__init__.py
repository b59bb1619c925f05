"""Hands a micro-batch to a model: its tokens, their positions, and who attends to whom.

Columns of a packed row stand in depth-first order, so that one number a column is the whole rule: token q
attends to token k exactly if `k <= q < subtree_end[k]`. Back-ends for it are registered with transformers
under names of their own; what they need to know of the row travels through the model's forward as a keyword
argument. No model code is changed, and without that argument they do what `sdpa` does.

    tiled   for each tile of queries, only the keys that it sees (_tiles, _tiled)
    flex    FlexAttention on a GPU, blocks that nobody sees left out (_flex)
    sdpa, eager and what else transformers has: a mask of all pairs (_dense), the reference
"""

from trainer.model.attention.inputs import (
    FLEX,
    OWN,
    TILED,
    loaded_implementation,
    model_inputs,
    readable,
    require_splittable,
    takes_trees,
)
from trainer.model.attention.registration import register_backends

__all__ = [
    "FLEX",
    "OWN",
    "TILED",
    "loaded_implementation",
    "model_inputs",
    "readable",
    "register_backends",
    "require_splittable",
    "takes_trees",
]

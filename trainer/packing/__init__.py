"""From samples to micro-batches: which tokens are computed together, and in which order.

`prefix_tree` folds sequences that start alike into a tree, so that a prompt shared by a group is computed
once and nothing is padded; each token attends to exactly its own ancestors. `plain` lays sequences end to
end in one row: no padding, nothing shared. `padded` gives each sequence a row of its own, for models whose
layers cannot be told where a sequence ends. All yield the same `MicroBatch`, and the same gradients as
training each sequence alone.

    samples -> sorted, common prefixes measured (_sorting) -> shared out by cost (_planning)
            -> one micro-batch each (_tree, _padded), trained tokens beside it (_trained_tokens)
"""

from trainer.packing._balancing import imbalance
from trainer.packing._cost import PassCost
from trainer.packing._micro_batch import MicroBatch, Packing
from trainer.packing._pack import pack

__all__ = ["MicroBatch", "Packing", "PassCost", "imbalance", "pack"]

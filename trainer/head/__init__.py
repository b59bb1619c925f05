"""The language-model head, applied only where a trained token is predicted, without [N, V] logits.

`capture_hidden_states` runs the model up to its head, `Head.score` does what the head would have done, and
`measure_transform` finds out what a model does to its logits afterwards. `trainer.head_choice` proves that
all this gives a model's own log-probs before a run relies on it.

torch's chunked `linear_cross_entropy` knows no soft cap, entropy or top-k, and one target a row. Liger's
fused head computes gradients in its forward pass, so only the loss it knows itself can come after it.
"""

from trainer.head._capture import capture_hidden_states
from trainer.head._head import Head, is_plain_linear
from trainer.head._row_chunks import row_chunk_scores
from trainer.head._scores import HeadScores, score_logits
from trainer.head._tiled import Tile, tiled_scores
from trainer.head._transform import LogitTransform, measure_transform

__all__ = [
    "Head",
    "HeadScores",
    "LogitTransform",
    "Tile",
    "capture_hidden_states",
    "is_plain_linear",
    "measure_transform",
    "row_chunk_scores",
    "score_logits",
    "tiled_scores",
]

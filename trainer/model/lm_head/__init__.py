"""The language-model head, applied only where a trained token is predicted, without [N, V] logits.

`capture_hidden_states` runs the model up to its head, `tiled_scores` does what the head would have done, and
`measure_transform` finds out what a model does to its logits afterwards. `select` proves that
all this gives a model's own log-probs before a run relies on it. Where it does not, `selected_logprobs` takes
them from the model's logits.

torch's chunked `linear_cross_entropy` knows no soft cap and no entropy, and one target a row. Liger's
fused head computes gradients in its forward pass, so only the loss it knows itself can come after it.
"""

from trainer.model.lm_head.capture import capture_hidden_states
from trainer.model.lm_head.fused_logprobs import HeadScores, TileSize, tiled_scores
from trainer.model.lm_head.logit_transform import LogitTransform, measure_transform
from trainer.model.lm_head.selected_logprobs import selected_logprobs

__all__ = [
    "HeadScores",
    "LogitTransform",
    "TileSize",
    "capture_hidden_states",
    "measure_transform",
    "selected_logprobs",
    "tiled_scores",
]

"""The choice between the two ways to apply a head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from trainer.head._row_chunks import row_chunk_scores
from trainer.head._scores import HeadScores
from trainer.head._tiled import tiled_scores
from trainer.head._transform import LogitTransform


@dataclass(frozen=True, kw_only=True)
class Head:
    """How a model's hidden states become log-probs without its logits."""

    transform: LogitTransform
    """What the model does to its head's output."""
    vocabulary: int
    """V: length of the model's logits."""

    def score(
        self,
        module: nn.Module,
        hidden: Tensor,
        rows: Tensor,
        targets: Tensor,
        *,
        temperature: Tensor | None = None,
        top_k: int = 0,
    ) -> HeadScores:
        """Score targets [N], each predicted from hidden[rows]; hidden is [U, H], temperature [U].

        Args:
            module: The model's head. A plain linear layer is walked in tiles, anything else is called.
            hidden: As the head would get them.
            rows: int64, in [0, U).
            targets: int64, in [0, V).
            temperature: Divides the logits; None for 1.
            top_k: How many of each row's likeliest tokens to name.
        """
        if isinstance(module, nn.Linear) and is_plain_linear(module):
            return tiled_scores(
                hidden,
                module.weight,
                module.bias,
                rows,
                targets,
                temperature=temperature,
                transform=self.transform,
                top_k=top_k,
            )
        return row_chunk_scores(
            module,
            hidden,
            rows,
            targets,
            vocabulary=self.vocabulary,
            temperature=temperature,
            transform=self.transform,
            top_k=top_k,
        )


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer and nothing more: no subclass, no hooks, no replaced forward."""
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )

"""Decides, once at start, whether log-probs come from a model's hidden states or from its logits."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor, nn

from trainer.errors import ConfigurationError
from trainer.model.attention import model_inputs
from trainer.model.lm_head import LogitTransform, measure_transform
from trainer.model.token_logprobs import token_logprobs
from trainer.model.wrappers import unwrap
from trainer.packing import MicroBatch, pack
from trainer.samples.sample import Sample

logger = logging.getLogger(__name__)

# In nats. A head that we misunderstand is off by far more; what differs otherwise is the order of sums.
_TOLERANCE = 1e-3


def choose_head(model: nn.Module, wanted: Literal["auto", "tiled", "logits"]) -> LogitTransform | None:
    """Resolve `model.head` for this model.

    What the model does to its head's output is measured, and then the result is proven: on a short input
    our log-probs must be those of the model's own logits.

    Returns:
        What `token_logprobs` takes as `head`; None stands for the model's own logits.

    Raises:
        ConfigurationError: tiled was asked for and this model's log-probs cannot be had that way.
    """
    if wanted == "logits":
        return None
    try:
        return _proven_head(model)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        # Whatever a foreign forward() raises when its head is taken away is the answer we are asking for.
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    if wanted == "tiled":
        raise ConfigurationError(f"model.head tiled is not possible here: {reason}; use auto or logits")
    logger.warning("Taking the model's own logits, whole, not log-probs in tiles: %s", reason)
    return None


@torch.no_grad()
def _proven_head(model: nn.Module) -> LogitTransform:
    """Raise ValueError, or whatever the model raises, where our log-probs are not the model's."""
    inner = unwrap(model)
    if inner.get_output_embeddings() is None:
        raise ValueError("the model names no output embeddings")
    if not is_plain_linear(inner.get_output_embeddings()):
        raise ValueError("the model's head is more than a matrix (an adapter on it, for instance)")
    batch = _short_batch().to(next(model.parameters()).device)
    was_training = model.training
    model.eval()
    try:
        inputs = model_inputs(inner, batch)
        head = measure_transform(inner, inputs)
        own = token_logprobs(model, batch, use_temperature=True)
        ours = token_logprobs(model, batch, use_temperature=True, head=head)
    finally:
        model.train(was_training)
    for name, found, expected in (
        ("log-probs", ours.logprobs, own.logprobs),
        ("entropies", ours.entropy, own.entropy),
    ):
        if not _close(found, expected):
            difference = float((found - expected).abs().max())
            raise ValueError(f"{name} taken from its hidden states differ by {difference:.2g} nats")
    return head


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


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool(((found - expected).abs() < _TOLERANCE).all())  # False for NaN


def _short_batch() -> MicroBatch:
    """Two short sequences of different lengths and temperatures, every token trained."""
    samples = [
        Sample(
            tokens=torch.tensor(tokens),
            loss_mask=torch.tensor([0.0] + [1.0] * (len(tokens) - 1)),
            advantages=torch.ones(len(tokens)),
            inference_logprobs=None,
            ref_logprobs=None,
            temperature=temperature,
            score=0.0,
            env_id=None,
            group_index=0,
        )
        for tokens, temperature in (([3, 1, 4, 1, 5, 9, 2, 6], 1.0), ([3, 1, 5, 3, 5], 0.7))
    ]
    (batch,) = pack(samples, [1.0, 1.0], packing="padded", tokens_per_micro_batch=64)
    return batch

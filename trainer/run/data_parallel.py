"""Fits a model for data parallelism: all that is trained gets a gradient, in an order that stays.

Parameters that text does not reach, a vision tower say, would be waited for in every step: they are frozen.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn

from trainer.model.wrappers import unwrap

logger = logging.getLogger(__name__)

_TOKENS: Final = 16
_ONE_EXPERT: Final = re.compile(r"experts?\.\d+\.")


def freeze_unused_parameters(model: nn.Module) -> bool:
    """Freeze the parameters outside the language model that no text reaches.

    Args:
        model: As loaded, on its device, perhaps with adapters.

    Returns:
        Whether others may go without a gradient in some steps: experts that no token is sent to. They stay
        trained, and data parallelism has to look for them.
    """
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    reached = {id(each) for each in _parameters_behind(_logits_of_some_text(model))}
    unused = [name for name, each in trained.items() if id(each) not in reached]
    language_model = {id(each) for each in _decoder(model).parameters()}
    frozen = [name for name in unused if id(trained[name]) not in language_model]
    for name in frozen:
        trained[name].requires_grad_(False)
    if frozen:
        logger.warning(
            "%d of %d parameter tensors get no gradient from text and are not trained: %s%s",
            *(len(frozen), len(trained), ", ".join(frozen[:3]), ", ..." if len(frozen) > 3 else ""),
        )
    return len(unused) > len(frozen) or any(_ONE_EXPERT.search(name) for name in trained)


def settle_gradient_buckets(model: nn.Module) -> None:
    """Let DistributedDataParallel decide now in which buckets gradients are summed.

    It does so after its first backward pass, by the order in which gradients came. What sums of three or more
    numbers are in their last bit depends on it: a resumed run would differ in its first step.
    """
    nothing = _logits_of_some_text(model).sum() * 0.0
    torch.autograd.backward(nothing)
    model.zero_grad(set_to_none=True)


def _logits_of_some_text(model: Any) -> Tensor:
    inner: Any = unwrap(model)
    device = next(inner.parameters()).device
    vocabulary = inner.get_input_embeddings().num_embeddings
    tokens = torch.arange(_TOKENS, device=device)[None] % vocabulary
    was_training = model.training
    model.eval()
    try:
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    finally:
        model.train(was_training)
    return logits


def _parameters_behind(result: Tensor) -> Iterable[Tensor]:
    """Yield the leaves that a result's gradient would flow to; nothing is computed."""
    seen: set[Any] = set()
    waiting: list[Any] = [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting.extend(following for following, _ in node.next_functions)


def _decoder(model: nn.Module) -> nn.Module:
    inner: Any = unwrap(model)
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else inner
    return decoder if isinstance(decoder, nn.Module) else inner

"""The trainer's own log-probs of the probes: what a server has to agree with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def score_with_model(
    model: nn.Module, token_id_lists: list[list[int]], device: torch.device | str
) -> list[list[float]]:
    """Score token sequences with the weights as they are.

    Without autocast, unless the caller has opened one: the master weights in float32 are the truth that
    servers round. Scoring with weights cast the way they are served would come closer to the server's
    numbers, but costs a second copy of the model and would hide an error of the cast itself; the rounding
    is in the tolerance instead. Dropout is off while scoring, no random number is drawn, and no gradient
    is kept.

    Args:
        model: A causal language model, wrapped or not.
        token_id_lists: Sequences of at least two tokens.
        device: Where the model is.

    Returns:
        For each sequence the log-probs of its tokens 1..T-1, in nats, from a float32 log-softmax.
    """
    with evaluation_mode(model), torch.no_grad():
        return [_score_one(model, token_ids, device) for token_ids in token_id_lists]


def _score_one(model: nn.Module, token_ids: list[int], device: torch.device | str) -> list[float]:
    input_ids = torch.tensor([token_ids], device=device)  # [1, T]
    logits: Tensor = model(input_ids=input_ids, use_cache=False).logits[0, :-1]  # [T-1, V]
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    scores: list[float] = logprobs.gather(-1, input_ids[0, 1:, None])[:, 0].tolist()
    return scores


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch every module to evaluation; on leaving, each gets back the mode that it had itself."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training

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
    longest = max(map(len, token_id_lists))
    # Padding goes to the right, where a causal model cannot see it. One pass over a padded batch: several
    # passes over short sequences cost several times as much, in overhead and waiting for other threads.
    padded = [token_ids + [token_ids[-1]] * (longest - len(token_ids)) for token_ids in token_id_lists]
    present = [[1] * len(token_ids) + [0] * (longest - len(token_ids)) for token_ids in token_id_lists]
    # The class's forward: where the hardware has bfloat16, Accelerate replaces the model's own by one that
    # opens autocast.
    forward = type(model).forward
    with evaluation_mode(model), torch.no_grad():
        logits: Tensor = forward(
            model,
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(present, device=device),
            use_cache=False,
        ).logits  # [B, T, V]
        return [_pick(row, token_ids) for row, token_ids in zip(logits, token_id_lists, strict=True)]


def _pick(logits: Tensor, token_ids: list[int]) -> list[float]:
    """Log-probs of one row's own tokens; logits are [T, V], possibly padded."""
    targets = torch.tensor(token_ids[1:], device=logits.device)
    logprobs = torch.log_softmax(logits[: len(targets)].float(), dim=-1)  # [T-1, V]
    scores: list[float] = logprobs.gather(-1, targets[:, None])[:, 0].tolist()
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

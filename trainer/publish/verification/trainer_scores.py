"""Computes the trainer's own log-probs of the probes: what a server has to agree with."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.lm_head import selected_logprobs
from trainer.publish.verification.compare_logprobs import ProbeScores
from trainer.publish.verification.probes import Probes


def score_probes(model: nn.Module, probes: Probes, device: torch.device | str) -> ProbeScores:
    """Score everything that verification asks; see `score_with_model` for how.

    Args:
        model: A causal language model, wrapped or not.
        probes: What is asked.
        device: Where the model is.
    """
    texts = score_with_model(model, probes.texts, device)
    if not probes.cuts:
        return ProbeScores(texts=texts, next_tokens=())
    with evaluation_mode(model), computing_in_float32(model), torch.no_grad():
        # One pass: what comes after a beginning of the passage does not depend on how it goes on.
        logits = _logits(model, [probes.passage], device)[0, [cut - 1 for cut in probes.cuts]]  # [C, V]
        rows = torch.log_softmax(logits.float(), dim=-1).cpu()
    return ProbeScores(texts=texts, next_tokens=tuple(array("f", row.numpy().tobytes()) for row in rows))


def score_with_model(
    model: nn.Module, token_id_lists: list[list[int]], device: torch.device | str
) -> list[list[float]]:
    """Score token sequences with the weights as they are.

    Without autocast, unless the caller has opened one, and in float32, whatever type the weights have: that
    is the truth that servers round. Computing in the served type as well comes no closer: two bfloat16
    implementations differ from each other as much as each does from float32. It would also cost a second copy
    of the model, and hide an error of the cast itself; the rounding is in the tolerance instead. Dropout is
    off while scoring, no random number is drawn, and no gradient is kept.

    Args:
        model: A causal language model, wrapped or not.
        token_id_lists: Sequences of at least two tokens.
        device: Where the model is.

    Returns:
        For each sequence the log-probs of its tokens 1..T-1, in nats, from a float32 log-softmax.
    """
    with evaluation_mode(model), computing_in_float32(model), torch.no_grad():
        # All at once: probes are short, and a pass costs more than padding does.
        logits = _logits(model, token_id_lists, device)
        return [_pick(row, token_ids) for row, token_ids in zip(logits, token_id_lists, strict=True)]


def _logits(model: nn.Module, token_id_lists: list[list[int]], device: torch.device | str) -> Tensor:
    """Logits [B, T, V] of sequences, padded on the right, where a causal model cannot see it."""
    longest = max(map(len, token_id_lists))
    padded = [token_ids + [token_ids[-1]] * (longest - len(token_ids)) for token_ids in token_id_lists]
    present = [[1] * len(token_ids) + [0] * (longest - len(token_ids)) for token_ids in token_id_lists]
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor(padded, device=device),
        "attention_mask": torch.tensor(present, device=device),
        "use_cache": False,
    }
    with _own_forward(model):
        logits: Tensor = model(**inputs).logits
    return logits


@contextlib.contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """Let a model call its class's forward, by way of its hooks, which gather weights that are spread.

    Where the hardware has bfloat16, Accelerate replaces the model's own forward by one that opens autocast.
    """
    replaced = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if replaced is not None:
            model.forward = replaced


def _pick(logits: Tensor, token_ids: list[int]) -> list[float]:
    """Log-probs of one row's own tokens; logits are [T, V], possibly padded."""
    targets = torch.tensor(token_ids[1:], device=logits.device)
    rows = torch.arange(len(targets), device=logits.device)
    scores: list[float] = selected_logprobs(logits, rows, targets).tolist()
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


@contextlib.contextmanager
def computing_in_float32(model: nn.Module) -> Iterator[None]:
    """Within it each module computes with its weights in float32, and has them so for no longer."""
    given: dict[nn.Module, dict[str, nn.Parameter]] = {}

    def widen(module: nn.Module, _: Any) -> None:
        given[module] = {
            name: each
            for name, each in module.named_parameters(recurse=False)
            if each.dtype in (torch.bfloat16, torch.float16)
        }
        for name, each in given[module].items():
            module._parameters[name] = nn.Parameter(each.detach().float(), requires_grad=False)

    def put_back(module: nn.Module, *_: Any) -> None:
        module._parameters.update(given.pop(module, {}))

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                stack.callback(module.register_forward_pre_hook(widen).remove)
                # Before a module that is spread over processes lets go of what it has gathered.
                hook = module.register_forward_hook(put_back, prepend=True, always_call=True)
                stack.callback(hook.remove)
        yield

"""Which packing and which attention a model can take: read from its configuration, then proven.

Ways are tried from the fastest to the one that every model takes. The proof is a self-test: a few branching
sequences must get the log-probs, and the gradient, that each gets alone. Before that the model itself is
tested: a token must not change the log-probs of those before it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.errors import ConfigurationError
from trainer.model.attention import FLEX, OWN, TILED, readable, register_backends, takes_trees
from trainer.model.token_logprobs import token_logprobs
from trainer.model.wrappers import unwrap
from trainer.packing import Packing, pack
from trainer.samples.sample import Sample

logger = logging.getLogger(__name__)

PACKINGS: tuple[Packing, ...] = ("prefix_tree", "plain", "padded")
"""From the fastest to the one that every model takes."""

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
_LONGEST_TEST_ON_A_CPU = 1024
"""Tokens. A window beyond is tested on accelerators only: a test must not take minutes."""
_MOST_LOGPROB_DIFFERENCE = 1e-3
_MOST_LOGPROB_DIFFERENCE_IN_HALF_PRECISION = 0.1
_MOST_GRADIENT_DIFFERENCE = 1e-2
"""Relative to the largest entry."""
_RAISED_BY_FORWARD = (
    TypeError,
    ValueError,
    RuntimeError,
    IndexError,
    AttributeError,
    KeyError,
    AssertionError,
    ImportError,
)
_MOST_LOOKING_AHEAD = 1e-5
_MOST_LOOKING_AHEAD_TO_BACK = 0.05
"""Largest change by later tokens, as a share of that by earlier ones. In a causal model it is rounding at
most, where experts get other tokens; in an encoder the two are alike."""


@dataclass(frozen=True)
class _Way:
    packing: Packing
    implementation: str
    """Attention by transformers' name."""

    def __str__(self) -> str:
        return f"{self.packing} with attention {readable(self.implementation)}"


def choose_packing(
    model: nn.Module,
    packing: Literal["auto", "prefix_tree", "plain", "padded"],
    attention: str = "auto",
    *,
    longest_sequence: int | None = None,
) -> Packing:
    """Resolve `data.packing` and `model.attention` for this model, and switch its attention.

    Args:
        model: As loaded, on its device, perhaps with adapters.
        packing: What the configuration asks for.
        attention: What the configuration asks for.
        longest_sequence: Tokens of the longest sequence that will be trained on; a sliding window that is
            longer changes nothing. None: unknown.

    Raises:
        ConfigurationError: The model is not causal; or a packing was asked for that it, or its attention,
            cannot take.
    """
    register_backends()
    inner = unwrap(model)
    refuse_looking_ahead(model)
    loaded = str(getattr(inner.config, "_attn_implementation", None))
    ways = list(_ways(packing, attention, loaded, next(inner.parameters()).device))
    reasons: list[str] = []
    for way in ways:
        reason = _switch(inner, way.implementation)
        if reason is None and way.packing != "padded":
            reason = _reason_against(model, way, loaded, longest_sequence)
        if reason is None:
            _report(way, ways[0], reasons)
            return way.packing
        reasons.append(f"{way}: {reason}")
    _switch(inner, loaded)
    raise ConfigurationError(
        f"data.packing {packing} is not possible here ({'; '.join(reasons)}); use auto or padded"
    )


def refuse_looking_ahead(model: nn.Module) -> None:
    """Prove that a later token does not change earlier log-probs.

    An encoder with a language-model head (BERT, RoBERTa) sees the tokens that it is to predict: its losses
    fall, and it learns nothing that could be sampled.

    Args:
        model: As loaded, perhaps with adapters.

    Raises:
        ConfigurationError: It looks ahead, or fails on a sequence.
    """
    inner = unwrap(model)
    tokens = _test_samples(inner, None)[0].tokens
    quarter, half = len(tokens) // 4, len(tokens) // 2
    others = (tokens + 1) % inner.config.get_text_config().vocab_size
    sequences = (
        tokens,
        torch.cat([tokens[:half], others[half:]]),
        torch.cat([others[:quarter], tokens[quarter:]]),
    )
    try:
        found, after_the_end, after_the_start = (
            _logprobs_and_gradient(model, [_numbered_sample(each, 0)], "padded", 1)[0][quarter : half - 1]
            for each in sequences
        )
    except _RAISED_BY_FORWARD as error:
        name, reason = type(inner).__name__, f"{type(error).__name__}: {error}"
        raise ConfigurationError(
            f"{name} cannot be trained: a test of one sequence failed, {reason}"
        ) from error
    if not bool(torch.isfinite(found).all()):
        raise ConfigurationError(
            f"{type(inner).__name__} has log-probs that are no numbers: its weights hold NaN or infinities"
        )
    ahead = float((found - after_the_end).abs().amax())
    back = float((found - after_the_start).abs().amax())
    if not ahead <= max(_MOST_LOOKING_AHEAD, _MOST_LOOKING_AHEAD_TO_BACK * back):
        raise ConfigurationError(
            f"{type(inner).__name__} is no causal language model: other tokens at the end change the "
            f"log-probs of those before them, by {ahead:.2g}. An encoder (BERT, RoBERTa) cannot be "
            "used here; name a decoder"
        )


def _ways(packing: str, attention: str, loaded: str, device: torch.device) -> Iterator[_Way]:
    """List the packings to try, in this order."""
    if attention == "auto":
        implementations = [FLEX if device.type == "cuda" else TILED, loaded]
    else:
        implementations = [OWN.get(attention, loaded)]
    for each in PACKINGS if packing == "auto" else [each for each in PACKINGS if each == packing]:
        if each == "padded":
            yield _Way(each, loaded)
        else:
            yield from (_Way(each, implementation) for implementation in implementations)


def _report(way: _Way, first: _Way, reasons: list[str]) -> None:
    if way.packing == first.packing:
        logger.info("Packing sequences %s%s", way, f" ({'; '.join(reasons)})" if reasons else "")
    else:
        logger.warning("Packing sequences %s, because: %s", way, "; ".join(reasons))


def _switch(inner: Any, implementation: str) -> str | None:
    """Let the model use another attention; returns why it cannot."""
    if getattr(inner.config, "_attn_implementation", None) == implementation:
        return None
    try:
        inner.set_attn_implementation(implementation)
    except (ValueError, ImportError, AttributeError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    if inner.config._attn_implementation != implementation:
        return "the model does not take its attention from transformers' AttentionInterface"
    return None


def _reason_against(model: nn.Module, way: _Way, loaded: str, longest_sequence: int | None) -> str | None:
    config = unwrap(model).config.get_text_config()
    reason = _reason_by_configuration(config, way, longest_sequence)
    if reason is not None:
        return reason
    try:
        return _reason_by_test(model, way, loaded, longest_sequence)
    except _RAISED_BY_FORWARD as error:
        # Whatever a foreign forward() raises on an unusual row is the answer we are asking for.
        return f"{type(error).__name__}: {error}"


def _reason_by_configuration(config: Any, way: _Way, longest_sequence: int | None) -> str | None:
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds - _ATTENTION_LAYERS:
        return f"the model has layers of the kinds {', '.join(sorted(kinds))}"
    own = way.implementation in OWN.values()
    if way.packing == "prefix_tree" and not takes_trees(way.implementation):
        return "it takes no mask of ours"
    if (own or way.packing == "prefix_tree") and "chunked_attention" in kinds:
        return "the model attends within chunks"
    window = _window(config)
    if (
        window is not None
        and (own or way.packing == "prefix_tree")
        and (longest_sequence is None or window < longest_sequence)
    ):
        return f"the model attends within a sliding window of {window} tokens"
    dropout = max(
        float(getattr(config, name, None) or 0.0)
        for name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    )
    if own and dropout > 0:
        return f"the model drops {dropout:.0%} of its attention, which this attention does not"
    return None


def _window(config: Any) -> int | None:
    """Length of the model's sliding window, if some layer has one."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    in_use = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    return int(window) if window and in_use else None


def _reason_by_test(model: nn.Module, way: _Way, loaded: str, longest_sequence: int | None) -> str | None:
    """Compare the way with one row a sequence under the attention that the model was loaded with."""
    inner = unwrap(model)
    samples = _test_samples(inner, longest_sequence)
    try:
        _switch(inner, loaded)
        alone, gradient_alone = _logprobs_and_gradient(model, samples, "padded", 1)
        _switch(inner, way.implementation)
        found, gradient = _logprobs_and_gradient(model, samples, way.packing, 1 << 30)
    finally:
        _switch(inner, way.implementation)
    difference = float((found - alone).abs().max())
    most = _MOST_LOGPROB_DIFFERENCE
    if _needs_half_precision(way.implementation) or _needs_half_precision(loaded):
        most = _MOST_LOGPROB_DIFFERENCE_IN_HALF_PRECISION
    if not difference <= most:
        return f"log-probs differ by {difference:.2g} from those of each sequence alone"
    if most > _MOST_LOGPROB_DIFFERENCE:
        return None
    largest = float(gradient_alone.abs().max())
    off = float((gradient - gradient_alone).abs().max())
    if not off <= _MOST_GRADIENT_DIFFERENCE * largest:
        return f"gradients differ by {off / max(largest, 1e-30):.2g} from those of each sequence alone"
    return None


def _needs_half_precision(implementation: str) -> bool:
    return "flash" in implementation


def _logprobs_and_gradient(
    model: nn.Module, samples: list[Sample], packing: Packing, budget: int
) -> tuple[Tensor, Tensor]:
    """Log-probs of all trained tokens, in the samples' order, and the gradient of one weight."""
    inner = unwrap(model)
    was_training = model.training
    model.eval()
    weight = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    gradient = torch.zeros_like(weight)
    found, numbers = [], []
    half = _needs_half_precision(inner.config._attn_implementation)
    for batch in pack(samples, [1.0] * len(samples), packing=packing, tokens_per_micro_batch=budget):
        with torch.autocast(weight.device.type, torch.bfloat16, enabled=half):
            logprobs = token_logprobs(model, batch.to(weight.device), use_temperature=False).logprobs
        (part,) = torch.autograd.grad(logprobs.sum(), weight, allow_unused=True)
        gradient += 0.0 if part is None else part
        found.append(logprobs.detach())
        numbers.append(batch.advantages)  # advantages number the trained tokens, to find them again
    model.train(was_training)
    return torch.cat(found)[torch.cat(numbers).argsort()], gradient


def _test_samples(inner: Any, longest_sequence: int | None) -> list[Sample]:
    """Two trees that branch at several depths, longer than a tile; one sequence passes a sliding window."""
    config = inner.config.get_text_config()
    device = next(inner.parameters()).device
    context = getattr(config, "max_position_embeddings", None) or 1 << 20
    length = min(context, longest_sequence or context, 160)
    window = _window(config)
    if window is not None:
        beyond = min(window + window // 8 + 8, context, longest_sequence or context)
        length = max(length, beyond if device.type != "cpu" else min(beyond, _LONGEST_TEST_ON_A_CPU))
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        return torch.randint(config.vocab_size, (max(count, 0),), generator=generator)

    trunk, other = draw(length), draw(length // 2)
    sequences = [
        trunk,
        torch.cat([trunk[: length // 3], draw(length // 3)]),
        torch.cat([trunk[: length // 3], draw(3)]),
        torch.cat([trunk[: length // 2], draw(length // 4)]),
        other,
        torch.cat([other[: length // 4], draw(5)]),
    ]
    samples, first = [], 0
    for tokens in sequences:
        samples.append(_numbered_sample(tokens, first))
        first += len(tokens)
    return samples


def _numbered_sample(tokens: Tensor, first: int) -> Sample:
    """A sample that trains on every token and whose advantages number them."""
    mask = torch.ones(len(tokens))
    mask[0] = 0.0
    return Sample(
        tokens=tokens,
        loss_mask=mask,
        advantages=torch.arange(first, first + len(tokens), dtype=torch.float32),
        inference_logprobs=None,
        ref_logprobs=None,
        temperature=1.0,
        score=0.0,
        env_id=None,
        group_index=0,
    )

"""compute_advantage_weighted_sft_loss against a reference in plain Python, and against bad input."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tests.trainer.models import VOCABULARY, tiny_model
from trainer.errors import ConfigurationError, DataError, ShapeMismatchError
from trainer.model.weighted_sft_call import Alignment, compute_advantage_weighted_sft_loss

ALIGNMENTS: tuple[Alignment, ...] = ("prediction", "token")


class FixedLogits(nn.Module):
    """A model that answers the logits it was given, whatever it is asked."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, *, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.logits)


def loss_by_hand(
    logits: Tensor, input_ids: Tensor, advantages: Tensor, loss_mask: Tensor, alignment: str
) -> float:
    """The definition, position by position, in float64 and without torch."""
    scores = logits.detach().double().numpy()
    numerator = denominator = 0.0
    for row in range(input_ids.shape[0]):
        for position in range(input_ids.shape[1] - 1):
            column = position if alignment == "prediction" else position + 1
            weight = float(loss_mask[row, column])
            denominator += weight
            if weight == 0:
                continue
            predictions = scores[row, position]
            highest = predictions.max()
            log_normalizer = highest + math.log(np.exp(predictions - highest).sum())
            cross_entropy = log_normalizer - predictions[int(input_ids[row, position + 1])]
            numerator += cross_entropy * float(advantages[row, column]) * weight
    return numerator / (denominator + 1e-8)


def loss_of_the_seed(logits: Tensor, input_ids: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
    """The seed document's code, as it stands there."""
    shift_logits = logits[..., :-1, :].contiguous()
    shift_labels = input_ids[..., 1:].contiguous()
    flat_advantages = advantages[..., :-1].contiguous().view(-1)
    flat_loss_mask = loss_mask[..., :-1].contiguous().view(-1)
    flat_logits = shift_logits.view(-1, shift_logits.size(-1))
    ce_loss = functional.cross_entropy(flat_logits, shift_labels.view(-1), reduction="none")
    weighted_loss = ce_loss * flat_advantages * flat_loss_mask
    return weighted_loss.sum() / (flat_loss_mask.sum() + 1e-8)


def batch(
    rows: int = 3, tokens: int = 11, vocabulary: int = VOCABULARY, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Ragged sequences: each row is trained on a span of its own."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(vocabulary, (rows, tokens), generator=generator)
    advantages = torch.randn(rows, tokens, generator=generator)
    loss_mask = torch.zeros(rows, tokens)
    for row in range(rows):
        loss_mask[row, 2 + row : tokens - row] = 1.0
    return input_ids, advantages, loss_mask


def test_default_alignment_and_its_gradients_are_the_seeds() -> None:
    model = tiny_model("gpt2", dtype=torch.float32)
    input_ids, advantages, loss_mask = batch()
    expected = loss_of_the_seed(model(input_ids=input_ids).logits, input_ids, advantages, loss_mask)
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss = compute_advantage_weighted_sft_loss(model, input_ids, advantages, loss_mask)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for parameter, gradient in zip(model.parameters(), expected_gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


def test_the_alignments_differ_by_exactly_one_column() -> None:
    logits = torch.randn(2, 9, 30)
    input_ids, advantages, loss_mask = batch(2, 9, vocabulary=30)
    model = FixedLogits(logits)
    by_token = compute_advantage_weighted_sft_loss(model, input_ids, advantages, loss_mask, alignment="token")
    moved = compute_advantage_weighted_sft_loss(
        model, input_ids, advantages.roll(-1, dims=1), loss_mask.roll(-1, dims=1), alignment="prediction"
    )
    by_prediction = compute_advantage_weighted_sft_loss(model, input_ids, advantages, loss_mask)
    assert by_token.item() == moved.item()
    assert by_token.item() != pytest.approx(by_prediction.item(), rel=1e-3)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_an_all_masked_batch_gives_zero_and_zero_gradients(alignment: Alignment) -> None:
    model = tiny_model("gpt2", dtype=torch.float32)
    input_ids, advantages, loss_mask = batch()
    loss = compute_advantage_weighted_sft_loss(
        model, input_ids, advantages, torch.zeros_like(loss_mask), alignment=alignment
    )
    loss.backward()
    assert loss.item() == 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_nothing_at_a_masked_position_matters(poison: float) -> None:
    logits = torch.randn(2, 8, 20)
    input_ids, advantages, loss_mask = batch(2, 8, vocabulary=20)
    clean, poisoned = FixedLogits(logits.clone()), FixedLogits(logits.clone())
    with torch.no_grad():
        poisoned.logits[:, :-1][loss_mask[:, :-1] == 0] = poison
        poisoned.logits[:, -1] = poison
    bad_advantages = advantages.masked_fill(loss_mask == 0, poison)
    bad_advantages[:, -1] = poison
    expected = compute_advantage_weighted_sft_loss(clean, input_ids, advantages, loss_mask)
    loss = compute_advantage_weighted_sft_loss(poisoned, input_ids, bad_advantages, loss_mask)
    expected.backward()
    loss.backward()
    assert loss.item() == expected.item()
    assert torch.equal(poisoned.logits.grad, clean.logits.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float64, torch.bfloat16])
def test_masks_of_every_dtype_mean_the_same(dtype: torch.dtype) -> None:
    # 700 trained positions: bfloat16 could not count them.
    logits = torch.randn(1, 704, 10)
    input_ids, advantages, loss_mask = batch(1, 704, vocabulary=10)
    model = FixedLogits(logits)
    expected = compute_advantage_weighted_sft_loss(model, input_ids, advantages, loss_mask)
    loss = compute_advantage_weighted_sft_loss(model, input_ids, advantages, loss_mask.to(dtype))
    assert loss.item() == expected.item()


def test_unequal_shapes_are_refused_and_all_are_listed() -> None:
    input_ids, advantages, loss_mask = batch(2, 8, vocabulary=20)
    with pytest.raises(
        ShapeMismatchError, match=r"input_ids \[2, 8\], advantages \[2, 7\], loss_mask \[2, 8\]"
    ):
        compute_advantage_weighted_sft_loss(
            FixedLogits(torch.randn(2, 8, 20)), input_ids, advantages[:, :-1], loss_mask
        )


@pytest.mark.parametrize("shape", [(8,), (1, 2, 8), (0, 8), (2, 0)])
def test_anything_but_a_filled_batch_of_rows_is_refused(shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ShapeMismatchError, match=r"one shape \[batch, tokens\]"):
        compute_advantage_weighted_sft_loss(FixedLogits(torch.randn(2, 8, 20)), tensor, tensor, tensor)


def test_logits_of_another_length_are_refused() -> None:
    input_ids, advantages, loss_mask = batch(2, 8, vocabulary=20)
    with pytest.raises(ShapeMismatchError, match=r"logits \[2, 1, 20\] for input_ids \[2, 8\]"):
        compute_advantage_weighted_sft_loss(
            FixedLogits(torch.randn(2, 1, 20)), input_ids, advantages, loss_mask
        )


def _changed(values: Tensor, position: tuple[int, int], value: float) -> Tensor:
    values = values.clone()
    values[position] = value
    return values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, a, m: (i, _changed(a, (0, 3), math.nan), m), "1 of 9 advantages at unmasked positions"),
        (lambda i, a, m: (i, _changed(a, (0, 3), math.inf), m), "1 of 9 advantages at unmasked positions"),
        (lambda i, a, m: (i, a, _changed(m, (0, 0), -1.0)), "negative or non-finite"),
        (lambda i, a, m: (i, a, _changed(m, (0, 0), math.nan)), "negative or non-finite"),
        (lambda i, a, m: (i, a, torch.where(m > 0, i, -100)), r"pass \(masks != -100\)"),
        (lambda i, a, m: (i, a, m.to(torch.complex64)), "loss_mask is torch.complex64"),
        (lambda i, a, m: (i.float(), a, m), "input_ids are torch.float32"),
        (lambda i, a, m: (_changed(i, (1, 1), -100), a, m), "input_ids hold -100"),
        (lambda i, a, m: (_changed(i, (0, 4), 20), a, m), "logits cover 0 to 19"),
    ],
)
def test_bad_values_are_refused_with_what_was_found(change: Any, message: str) -> None:
    inputs = change(*batch(2, 8, vocabulary=20))
    with pytest.raises(DataError, match=message):
        compute_advantage_weighted_sft_loss(FixedLogits(torch.randn(2, 8, 20)), *inputs)


def test_an_unknown_alignment_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'prediction' and 'token'"):
        compute_advantage_weighted_sft_loss(
            FixedLogits(torch.randn(2, 8, 20)),
            *batch(2, 8, vocabulary=20),
            alignment="tokens",  # type: ignore[arg-type]
        )


def test_training_on_it_makes_praised_tokens_likelier_and_blamed_ones_rarer() -> None:
    model = tiny_model("gpt2", dtype=torch.float32)
    input_ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    advantages = torch.tensor([[1.0] * 4, [-1.0] * 4])
    mask = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 1]])

    def logprob(row: int) -> float:
        with torch.no_grad():
            return float(model(input_ids=input_ids).logits[row, 2].log_softmax(-1)[input_ids[row, 3]])

    before = [logprob(0), logprob(1)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        compute_advantage_weighted_sft_loss(model, input_ids, advantages, mask, alignment="token").backward()
        optimizer.step()
    assert logprob(0) > before[0]
    assert logprob(1) < before[1]


def test_gradients_flow_under_bfloat16_autocast() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    inputs = batch()
    exact = compute_advantage_weighted_sft_loss(model, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = compute_advantage_weighted_sft_loss(model, *inputs)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), abs=0.05)
    assert all(parameter.grad is not None for parameter in model.parameters())


@settings(deadline=None, max_examples=50)
@given(
    rows=st.integers(1, 4),
    tokens=st.integers(1, 9),
    seed=st.integers(0, 10_000),
    alignment=st.sampled_from(ALIGNMENTS),
    weighs=st.booleans(),
)
def test_equals_the_definition_on_random_batches(
    rows: int, tokens: int, seed: int, alignment: Alignment, weighs: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(rows, tokens, 13, dtype=torch.float64, generator=generator)
    input_ids = torch.randint(13, (rows, tokens), generator=generator)
    advantages = torch.randn(rows, tokens, generator=generator, dtype=torch.float64)
    loss_mask = torch.rand(rows, tokens, generator=generator) < 0.5
    if weighs:
        loss_mask = loss_mask * torch.rand(rows, tokens, generator=generator)
    loss = compute_advantage_weighted_sft_loss(
        FixedLogits(logits), input_ids, advantages, loss_mask, alignment=alignment
    )
    assert loss.item() == pytest.approx(
        loss_by_hand(logits, input_ids, advantages, loss_mask, alignment), rel=1e-7, abs=1e-12
    )

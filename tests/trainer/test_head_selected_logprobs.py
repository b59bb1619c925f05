"""selected_logprobs: the blocked log-softmax and its gradient."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.errors import DataError, ShapeMismatchError
from trainer.model.lm_head import selected_logprobs


def test_gradient_is_that_of_finite_differences_also_for_a_row_named_twice() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    rows, token_ids = torch.tensor([0, 3, 3, 4]), torch.tensor([6, 0, 2, 2])
    assert torch.autograd.gradcheck(lambda values: selected_logprobs(values, rows, token_ids), (logits,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_log_softmax_over_several_blocks_of_a_large_vocabulary(dtype: torch.dtype) -> None:
    rows_in_all, vocabulary = 150, 150_000  # 22.5M logits: more than one block of 16.8M
    logits = (4 * torch.randn(rows_in_all, vocabulary)).to(dtype).requires_grad_()
    rows = torch.arange(0, rows_in_all)
    token_ids = torch.randint(vocabulary, (rows_in_all,))
    weights = torch.randn(rows_in_all)
    logprobs = selected_logprobs(logits, rows, token_ids)
    (gradient,) = torch.autograd.grad((logprobs * weights).sum(), logits)
    expected = logits.float().log_softmax(-1)[rows, token_ids]
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-2, atol=1e-6)


def test_rows_that_are_not_named_get_exact_zeros_whatever_they_hold() -> None:
    logits = torch.randn(4, 6)
    logits[1], logits[3] = math.inf, math.nan
    logits.requires_grad_()
    selected_logprobs(logits, torch.tensor([0, 2]), torch.tensor([5, 1])).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert not logits.grad[[1, 3]].any()


def test_tokens_ruled_out_by_minus_infinity_have_no_gradient() -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0]], requires_grad=True)
    selected_logprobs(logits, torch.tensor([0]), torch.tensor([2])).sum().backward()
    probability = 1 / (1 + math.exp(1))
    torch.testing.assert_close(logits.grad, torch.tensor([[-probability, 0.0, probability]]))


def test_no_rows_give_no_logprobs_and_a_zero_gradient() -> None:
    logits = torch.randn(4, 6, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.int64)
    logprobs = selected_logprobs(logits, empty, empty)
    logprobs.sum().backward()
    assert logprobs.shape == (0,)
    assert torch.equal(logits.grad, torch.zeros(4, 6))  # type: ignore[arg-type]


@pytest.mark.parametrize("token", [-1, 6])
def test_a_token_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(DataError, match="logits cover 0 to 5"):
        selected_logprobs(torch.randn(4, 6), torch.tensor([0]), torch.tensor([token]))


def test_unequal_rows_and_tokens_are_refused() -> None:
    with pytest.raises(ShapeMismatchError, match=r"rows \[2\], token_ids \[1\]"):
        selected_logprobs(torch.randn(4, 6), torch.tensor([0, 1]), torch.tensor([0]))

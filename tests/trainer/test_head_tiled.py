"""Log-probs in tiles are the plain log-softmax's, and so are their gradients."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.errors import DataError
from trainer.model.lm_head import HeadScores, LogitTransform, TileSize, tiled_scores


@dataclass
class Problem:
    hidden: Tensor  # [U, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    rows: Tensor  # [N]
    targets: Tensor  # [N]
    temperature: Tensor | None  # [U]
    slope: Tensor  # [N]: the loss's gradient in the log-probs
    entropy_slope: Tensor  # [U]: and in the entropies

    def leaves(self) -> list[Tensor]:
        return [value for value in (self.hidden, self.weight, self.bias) if value is not None]


def make_problem(
    *,
    seed: int = 0,
    rows: int,
    vocabulary: int,
    entries: int,
    bias: bool,
    temperature: bool,
    dtype: torch.dtype,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return Problem(
        hidden=draw(rows, 6).requires_grad_(),
        weight=draw(vocabulary, 6).requires_grad_(),
        bias=draw(vocabulary).requires_grad_() if bias else None,
        rows=torch.randint(rows, (entries,), generator=generator),
        targets=torch.randint(vocabulary, (entries,), generator=generator),
        temperature=draw(rows).abs() + 0.5 if temperature else None,
        slope=draw(entries),
        entropy_slope=draw(rows),
    )


def plain_logits(problem: Problem, transform: LogitTransform) -> Tensor:
    """The reference, [U, V], written out without any code of ours."""
    logits = nn.functional.linear(problem.hidden, problem.weight, problem.bias) * transform.scale
    if transform.cap is not None:
        logits = transform.cap * torch.tanh(logits / transform.cap)
    return logits if problem.temperature is None else logits / problem.temperature[:, None]


def gradients(problem: Problem, logprobs: Tensor | None, entropy: Tensor | None = None) -> list[Tensor]:
    """Of the sum over log-probs [N] and entropies [U], each times its slope."""
    pairs = ((logprobs, problem.slope), (entropy, problem.entropy_slope))
    loss = torch.stack([(values * slope).sum() for values, slope in pairs if values is not None]).sum()
    return list(torch.autograd.grad(loss, problem.leaves(), retain_graph=True))


def assert_like_plain(
    problem: Problem, transform: LogitTransform, scores: HeadScores, tolerance: float
) -> None:
    plain = plain_logits(problem, transform).log_softmax(-1)  # [U, V]
    reference = plain[problem.rows, problem.targets]
    entropy = -(plain.exp() * plain).sum(-1)

    def close(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)

    close(scores.logprobs, reference)
    close(scores.entropy, entropy)
    for ours, theirs in (
        ((scores.logprobs,), (reference,)),
        ((None, scores.entropy), (None, entropy)),
        ((scores.logprobs, scores.entropy), (reference, entropy)),
    ):
        for found, expected in zip(gradients(problem, *ours), gradients(problem, *theirs), strict=True):
            close(found, expected)


cases = {
    "seed": st.integers(0, 10_000),
    "rows": st.integers(1, 12),
    "vocabulary": st.integers(2, 40),
    "entries": st.integers(1, 25),
    "bias": st.booleans(),
    "temperature": st.booleans(),
    "tile": st.builds(TileSize, st.integers(1, 14), st.integers(1, 45)),
    "transform": st.builds(
        LogitTransform,
        scale=st.sampled_from([1.0, 0.25, 3.0]),
        cap=st.sampled_from([None, 0.8, 5.0]),
    ),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@settings(max_examples=100, deadline=None)
@given(**cases)
def test_values_and_gradients_are_those_of_plain_log_softmax(
    dtype: torch.dtype,
    tolerance: float,
    seed: int,
    rows: int,
    vocabulary: int,
    entries: int,
    bias: bool,
    temperature: bool,
    tile: TileSize,
    transform: LogitTransform,
) -> None:
    problem = make_problem(
        seed=seed,
        rows=rows,
        vocabulary=vocabulary,
        entries=entries,
        bias=bias,
        temperature=temperature,
        dtype=dtype,
    )
    scores = tiled_scores(
        *(problem.hidden, problem.weight, problem.bias, problem.rows, problem.targets),
        temperature=problem.temperature,
        transform=transform,
        tile=tile,
    )
    assert_like_plain(problem, transform, scores, tolerance)


def example(dtype: torch.dtype = torch.float64, *, entries: int = 40) -> Problem:
    return make_problem(rows=9, vocabulary=33, entries=entries, bias=True, temperature=True, dtype=dtype)


def test_targets_at_the_edges_of_blocks_are_found() -> None:
    problem = example(entries=6)
    problem.targets = torch.tensor([0, 7, 8, 15, 16, 32])
    scores = tiled_scores(
        *(problem.hidden, problem.weight, problem.bias, problem.rows, problem.targets),
        temperature=problem.temperature,
        tile=TileSize(4, 8),
    )
    assert_like_plain(problem, LogitTransform(), scores, 1e-12)


def test_logits_far_apart_neither_overflow_nor_vanish() -> None:
    problem = example(torch.float32)
    with torch.no_grad():
        problem.weight.mul_(300)
    scores = tiled_scores(
        *(problem.hidden, problem.weight, problem.bias, problem.rows, problem.targets),
        temperature=problem.temperature,
        tile=TileSize(4, 8),
    )
    assert float(scores.logprobs.detach().min()) < -1000
    assert_like_plain(problem, LogitTransform(), scores, 1e-4)


def test_no_entries_give_no_logprobs_and_zero_gradients() -> None:
    problem = example(entries=0)
    scores = tiled_scores(
        problem.hidden, problem.weight, problem.bias, problem.rows, problem.targets, tile=TileSize(4, 8)
    )
    assert scores.logprobs.shape == (0,)
    assert all(float(value.abs().sum()) == 0 for value in gradients(problem, scores.logprobs))


@pytest.mark.parametrize("token", [-1, 33, 5000])
def test_a_target_outside_the_vocabulary_is_refused(token: int) -> None:
    problem = example()
    problem.targets[3] = token
    with pytest.raises(DataError, match=f"token {token} is outside the head's vocabulary of 33"):
        tiled_scores(problem.hidden, problem.weight, None, problem.rows, problem.targets)


def test_equal_inputs_give_equal_bits() -> None:
    def run() -> list[Tensor]:
        problem = make_problem(
            rows=300, vocabulary=500, entries=2000, bias=True, temperature=True, dtype=torch.float32
        )
        scores = tiled_scores(
            *(problem.hidden, problem.weight, problem.bias, problem.rows, problem.targets),
            tile=TileSize(128, 200),
        )
        return [scores.logprobs.detach(), scores.entropy, *gradients(problem, scores.logprobs)]

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


def test_only_the_gradients_that_are_needed_are_computed() -> None:
    problem = example()
    problem.weight.requires_grad_(False)

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out)
            return func(*args, **(kwargs or {}))

    scores = tiled_scores(problem.hidden, problem.weight, None, problem.rows, problem.targets)
    with Products() as products:
        scores.logprobs.sum().backward()
    assert products.count == 2  # the logits again, and the hidden states' gradient
    assert problem.hidden.grad is not None
    assert problem.weight.grad is None


def test_under_autocast_products_are_bfloat16_and_everything_else_float32() -> None:
    problem = make_problem(
        rows=50, vocabulary=70, entries=90, bias=False, temperature=True, dtype=torch.float32
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = tiled_scores(
            *(problem.hidden, problem.weight, None, problem.rows, problem.targets),
            temperature=problem.temperature,
            tile=TileSize(16, 32),
        )
        logits = nn.functional.linear(problem.hidden, problem.weight)
    assert logits.dtype == torch.bfloat16
    assert problem.temperature is not None
    plain = (logits.float() / problem.temperature[:, None]).log_softmax(-1)
    reference = plain[problem.rows, problem.targets]
    assert scores.logprobs.dtype == scores.entropy.dtype == torch.float32
    # The same bfloat16 logits, hence float32-exact log-probs; a bfloat16 normalizer would be off by 1e-2.
    torch.testing.assert_close(scores.logprobs, reference, rtol=1e-5, atol=1e-5)
    for ours, expected in zip(
        gradients(problem, scores.logprobs), gradients(problem, reference), strict=True
    ):
        assert ours.dtype == torch.float32
        assert float((ours - expected).norm() / expected.norm()) < 0.01


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any tensor made by any operation had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_no_tensor_of_tokens_times_vocabulary_ever_exists() -> None:
    rows, vocabulary, tile = 256, 4096, TileSize(64, 512)
    problem = make_problem(
        rows=rows, vocabulary=vocabulary, entries=300, bias=True, temperature=True, dtype=torch.float32
    )
    with LargestTensor() as largest:
        scores = tiled_scores(
            *(problem.hidden, problem.weight, problem.bias, problem.rows, problem.targets),
            temperature=problem.temperature,
            transform=LogitTransform(scale=0.5, cap=20.0),
            tile=tile,
        )
        gradients(problem, scores.logprobs, scores.entropy)
    assert largest.elements == max(tile.rows * tile.vocabulary, problem.weight.numel())
    with LargestTensor() as plain:
        plain_logits(problem, LogitTransform())
    assert plain.elements == rows * vocabulary

"""Every attention back-end computes the same rule, and only what the rule lets it compute."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from tests.trainer.models import forests, make_sample, random_tree_samples, tiny_model
from trainer.model.attention import FLEX, TILED, model_inputs, register_backends
from trainer.model.attention.flex import BLOCK, FlexStructure, compiled_flex_attention, flex_tree_attention
from trainer.model.attention.inputs import STRUCTURE, dense_mask
from trainer.model.attention.tile_plan import TiledStructure, plan_tiles
from trainer.model.attention.tiled import tiled_attention
from trainer.packing import MicroBatch, pack
from trainer.samples.sample import Sample

CPU = torch.device("cpu")


def folded(samples: list[Sample]) -> MicroBatch:
    (batch,) = pack(samples, [1.0] * len(samples), packing="prefix_tree", tokens_per_micro_batch=1 << 30)
    return batch


def end_of(samples: list[Sample]) -> Tensor:
    end = folded(samples).subtree_end
    assert end is not None
    return end


def inputs(length: int, dtype: torch.dtype, heads: int = 4, key_heads: int = 2) -> tuple[Tensor, ...]:
    """Queries, keys and values as transformers hands them on: transposed views."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(1, length, count, 8, generator=generator, dtype=torch.float64)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for count in (heads, key_heads, key_heads)
    )


def dense(query: Tensor, key: Tensor, value: Tensor, end: Tensor, scaling: float | None) -> Tensor:
    mask = dense_mask(end)
    attended = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return attended.transpose(1, 2)


def with_gradients(attended: Tensor, sources: tuple[Tensor, ...]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, attended.numel(), dtype=attended.dtype).view(attended.shape)
    return [attended.detach(), *torch.autograd.grad((attended * weights).sum(), sources)]


@settings(max_examples=100, deadline=None)
@given(samples=forests(), size=st.sampled_from([1, 3, 16, 128]))
def test_tiles_cover_every_visible_pair_once_and_no_key_that_nobody_sees(
    samples: list[Sample], size: int
) -> None:
    end = end_of(samples)
    rule = dense_mask(end)[0, 0]
    tiles = list(plan_tiles(end.numpy(), size))
    assert [tile.start for tile in tiles] == [0, *(tile.stop for tile in tiles[:-1])]
    assert tiles[-1].stop == len(end)
    for tile in tiles:
        assert tile.stop - tile.start <= size
        columns = [column for start, stop in tile.keys for column in range(start, stop)]
        assert columns == sorted(set(columns))
        seen = rule[tile.start : tile.stop].any(0).nonzero()[:, 0].tolist()
        assert columns == seen


@settings(max_examples=40, deadline=None)
@given(samples=forests(), key_heads=st.sampled_from([1, 2, 4]), scaling=st.sampled_from([None, 0.3]))
def test_tiled_attention_and_its_gradients_equal_those_with_a_dense_mask(
    samples: list[Sample], key_heads: int, scaling: float | None
) -> None:
    end = end_of(samples)
    sources = inputs(len(end), torch.float64, key_heads=key_heads)
    ours = with_gradients(tiled_attention(*sources, TiledStructure(end, CPU, 100), scaling), sources)
    reference = with_gradients(dense(*sources, end, scaling), sources)
    for mine, theirs in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_tiled_attention_without_stored_masks_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    end = end_of(random_tree_samples(2, count=40))
    sources = inputs(len(end), torch.float64)
    stored = with_gradients(tiled_attention(*sources, TiledStructure(end, CPU, 40), None), sources)
    monkeypatch.setattr("trainer.model.attention.tile_plan._MOST_STORED_PAIRS", 0)
    made = with_gradients(tiled_attention(*sources, TiledStructure(end, CPU, 40), None), sources)
    assert all(torch.equal(one, other) for one, other in zip(stored, made, strict=True))


@pytest.mark.parametrize("sharpness", [0.2, 1.0, 4.0], ids=["flat", "usual", "sharp"])
def test_in_bfloat16_gradients_are_as_exact_as_those_with_a_dense_mask(sharpness: float) -> None:
    prompt = list(range(40))  # gathers gradients from every sequence
    samples = [make_sample([*prompt, *[50 + index] * 100], 40) for index in range(40)]
    end = end_of(samples)
    halves = inputs(len(end), torch.bfloat16)
    with torch.no_grad():
        halves[0].mul_(sharpness)
    doubles = tuple(half.detach().double().requires_grad_() for half in halves)
    exact = with_gradients(dense(*doubles, end, None), doubles)
    tiled = with_gradients(tiled_attention(*halves, TiledStructure(end, CPU, 140), None), halves)
    masked = with_gradients(dense(*halves, end, None), halves)
    ratios = [
        float((ours.double() - truth).norm() / (theirs.double() - truth).norm())
        for truth, ours, theirs in zip(exact, tiled, masked, strict=True)
    ]
    assert max(ratios) < 1.5, ratios  # the result, and the gradients of queries, keys and values
    assert sum(ratios) / len(ratios) < 1.0, ratios


def test_a_group_computes_few_of_the_pairs_of_a_dense_mask() -> None:
    prompt = list(range(97)) * 2
    samples = [make_sample([*prompt, *[index] * 100], 194) for index in range(8)]
    end = end_of(samples)
    computed = sum(
        (tile.stop - tile.start) * sum(stop - start for start, stop in tile.keys)
        for tile in plan_tiles(end.numpy())
    )
    visible = int((end - torch.arange(len(end))).sum())
    assert visible <= computed < 1.5 * visible < 0.5 * len(end) ** 2


@settings(max_examples=60, deadline=None)
@given(samples=st.lists(forests(), min_size=1, max_size=6).map(lambda parts: list(chain(*parts))))
def test_flex_blocks_hold_every_visible_pair_and_full_ones_nothing_else(samples: list[Sample]) -> None:
    end = end_of(samples)
    structure = FlexStructure.of(end, CPU, 100)
    mask = structure.block_mask
    blocks = mask.seq_lengths[0] // BLOCK
    rule = pad(dense_mask(end)[0, 0], (0, blocks * BLOCK - len(end)) * 2)
    by_block = rule.view(blocks, BLOCK, blocks, BLOCK).transpose(1, 2)
    for query in range(blocks):
        partial = mask.kv_indices[0, 0, query, : mask.kv_num_blocks[0, 0, query]].tolist()
        assert mask.full_kv_indices is not None
        assert mask.full_kv_num_blocks is not None
        full = mask.full_kv_indices[0, 0, query, : mask.full_kv_num_blocks[0, 0, query]].tolist()
        assert not set(partial) & set(full)
        assert all(by_block[query, key].all() for key in full)
        assert all(not by_block[query, key].any() for key in set(range(blocks)) - set(partial) - set(full))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("count", [4, 40, 120])
def test_flex_attention_equals_that_with_a_dense_mask(count: int) -> None:
    end = end_of(random_tree_samples(1, count=count))
    sources = tuple(value.detach() for value in inputs(len(end), torch.float64))
    ours = flex_tree_attention(*sources, FlexStructure.of(end, CPU, 40), 0.3)
    torch.testing.assert_close(ours, dense(*sources, end, 0.3), rtol=1e-9, atol=1e-12)


def test_flex_attention_is_not_compiled_again_for_other_lengths() -> None:
    counter = CompileCounter()  # type: ignore[no-untyped-call]
    attend = compiled_flex_attention(counter)
    compiled = []
    for seed, count in [(1, 40), (2, 60), (3, 90), (4, 5), (5, 150), (6, 200), (7, 17)]:
        end = end_of(random_tree_samples(seed, count=count))
        structure = FlexStructure.of(end, CPU, 40)
        filled = structure.block_mask.seq_lengths[0]
        query, key, value = (each.detach() for each in inputs(filled, torch.float32))
        attend(query, key, value, block_mask=structure.block_mask, enable_gqa=True)
        compiled.append(counter.frame_count)
    assert compiled[-1] == compiled[1] <= 2  # the second length shows that lengths change


def test_models_without_our_structure_attend_as_with_sdpa() -> None:
    """Scoring and generating use the same model with ordinary inputs, padding included."""
    register_backends()
    tokens = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(0))
    padding = torch.ones_like(tokens)
    padding[0, 15:] = 0
    found = []
    for attention in ("sdpa", TILED, FLEX):
        model = tiny_model("llama", attention=attention)
        with torch.no_grad():
            found.append(model(tokens, attention_mask=padding).logits[padding.bool()])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("asked", ["softcap", "s_aux", "position_bias", "dropout"])
def test_what_a_back_end_cannot_compute_is_refused(asked: str) -> None:
    register_backends()
    model = tiny_model("llama", attention=TILED)
    given = model_inputs(model, folded(random_tree_samples(1)))
    tensors = [value.detach() for value in inputs(10, torch.float64)]
    attention = AttentionInterface()[TILED]
    with pytest.raises(ValueError, match=asked):
        attention(model, *tensors, None, **{STRUCTURE: given[STRUCTURE], asked: 0.5})


def test_autocast_reaches_tiled_attention() -> None:
    register_backends()
    model = tiny_model("llama", dtype=torch.float32, attention=TILED)
    batch = folded(random_tree_samples(1, count=20))
    results = []
    for attention in (TILED, "sdpa"):
        model.set_attn_implementation(attention)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**model_inputs(model, batch)).logits
        logits.float().pow(2).mean().backward()
        results.append((logits.detach().float(), model.model.layers[0].self_attn.k_proj.weight.grad.clone()))
    for ours, reference in zip(*results, strict=True):
        assert float((ours - reference).abs().max()) < 0.03 * float(reference.abs().max())


def test_the_plan_of_a_long_row_is_linear_in_its_runs() -> None:
    end = np.full(200_000, 200_000)
    tiles = list(plan_tiles(end))
    assert all(len(tile.keys) == 1 for tile in tiles)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_compiled_flex_attention_and_its_gradients_equal_those_with_a_dense_mask(
    dtype: torch.dtype,
) -> None:
    end = end_of(random_tree_samples(1, count=120))
    sources = tuple(value.detach().cuda().requires_grad_() for value in inputs(len(end), dtype))
    attended = flex_tree_attention(*sources, FlexStructure.of(end, torch.device("cuda"), 40), None)
    reference = dense(*sources, end.cuda(), None)
    for mine, theirs in zip(
        torch.autograd.grad(attended.float().pow(2).sum(), sources),
        torch.autograd.grad(reference.float().pow(2).sum(), sources),
        strict=True,
    ):
        assert float((mine - theirs).abs().max()) < 0.03 * float(theirs.abs().max())


@needs_cuda
def test_on_a_gpu_the_compiled_kernel_serves_every_length() -> None:
    torch._dynamo.reset()
    compiled_flex_attention.cache_clear()
    for seed, count in [(1, 40), (2, 60)]:
        _run_on_gpu(seed, count)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, count in [(3, 90), (4, 5), (5, 150)]:
            _run_on_gpu(seed, count)


def _run_on_gpu(seed: int, count: int) -> None:
    end = end_of(random_tree_samples(seed, count=count))
    sources = tuple(value.detach().cuda().requires_grad_() for value in inputs(len(end), torch.bfloat16))
    attended = flex_tree_attention(*sources, FlexStructure.of(end, torch.device("cuda"), 40), None)
    attended.float().sum().backward()

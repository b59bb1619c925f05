"""Which packing and attention a model gets, and that a wrong choice cannot pass the self-test."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, Gemma2Config, Gemma2ForCausalLM, MambaConfig, MambaForCausalLM
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tests.trainer.models import random_tree_samples, tiny_model
from trainer.errors import ConfigurationError
from trainer.model.attention import TILED
from trainer.model.select_packing import choose_packing
from trainer.model.token_logprobs import token_logprobs
from trainer.packing import pack


def small(architecture: str, **options: Any) -> Any:
    return tiny_model(architecture, dtype=torch.float32, **options)


def gemma2(**options: Any) -> Any:
    config = Gemma2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **options,
    )
    return Gemma2ForCausalLM._from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2"])
def test_ordinary_models_get_the_tree_and_tiled_attention(architecture: str) -> None:
    model = small(architecture)
    model.config.update({"attn_pdrop": 0.0})
    assert choose_packing(model, "auto") == "prefix_tree"
    assert model.config._attn_implementation == TILED


def test_a_named_attention_is_used(caplog: pytest.LogCaptureFixture) -> None:
    model = small("llama")
    caplog.set_level(logging.INFO)
    assert choose_packing(model, "auto", "sdpa") == "prefix_tree"
    assert model.config._attn_implementation == "sdpa"
    assert len([record for record in caplog.records if "Packing sequences" in record.message]) == 1


def test_a_model_with_a_sliding_window_gets_plain_packing_with_one_line_that_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = small("mistral")
    assert choose_packing(model, "auto") == "plain"
    assert model.config._attn_implementation == "sdpa"
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "plain with attention sdpa" in record.message
    assert "sliding window of 8 tokens" in record.message


def test_plain_packing_with_a_sliding_window_gives_the_log_probs_of_each_sequence_alone() -> None:
    model = small("mistral")
    samples = [sample for sample in random_tree_samples(3, count=12) if sample.trained_tokens]
    found = []
    for packing, budget in (("plain", 10_000), ("padded", 1)):
        scores = []
        for batch in pack(samples, [1.0] * len(samples), packing=packing, tokens_per_micro_batch=budget):  # type: ignore[arg-type]
            logprobs = token_logprobs(model, batch, use_temperature=False).logprobs
            scores += zip(batch.targets.tolist(), batch.advantages.tolist(), logprobs.tolist(), strict=True)
        found.append(torch.tensor(sorted(scores)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_a_window_beyond_every_sequence_changes_nothing() -> None:
    model = small("mistral")
    assert choose_packing(model, "auto", longest_sequence=8) == "prefix_tree"
    assert model.config._attn_implementation == TILED


def test_a_model_that_caps_its_scores_gets_a_dense_mask() -> None:
    model = gemma2(sliding_window=4096, attn_logit_softcapping=50.0)
    assert choose_packing(model, "auto", longest_sequence=200) == "prefix_tree"
    assert model.config._attn_implementation == "eager"


def test_recurrent_layers_are_padded(caplog: pytest.LogCaptureFixture) -> None:
    model = MambaForCausalLM(
        MambaConfig(
            vocab_size=97, hidden_size=16, state_size=4, num_hidden_layers=2, bos_token_id=1, eos_token_id=2
        )
    )
    assert choose_packing(model, "auto") == "padded"
    (record,) = [record for record in caplog.records if "Packing sequences" in record.message]
    assert record.message.startswith("Packing sequences padded")


def test_attention_dropout_leaves_the_tree_to_a_dense_mask() -> None:
    model = small("llama")
    model.config.attention_dropout = 0.1
    assert choose_packing(model, "auto") == "prefix_tree"
    assert model.config._attn_implementation == "sdpa"


def test_a_packing_that_the_model_cannot_take_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match=r"data\.packing prefix_tree.*sliding window"):
        choose_packing(small("mistral"), "prefix_tree")


def test_an_attention_that_ignores_the_row_is_found_out() -> None:
    """The self-test compares numbers: one that attends to everything before is not believed."""

    def causal(_module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **_rest: Any) -> Any:
        attended = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        return attended.transpose(1, 2).contiguous(), None

    AttentionInterface.register("careless", causal)
    AttentionMaskInterface.register("careless", sdpa_mask)
    model = small("llama")
    model.set_attn_implementation("careless")
    assert choose_packing(model, "auto", "careless") == "padded"
    with pytest.raises(ConfigurationError, match="log-probs differ"):
        choose_packing(model, "plain", "careless")


def test_choosing_leaves_gradients_and_mode_as_they_were() -> None:
    model = small("llama")
    model.train()
    choose_packing(model, "auto")
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())

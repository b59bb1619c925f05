"""Parameters that text does not reach are frozen; experts that no token is sent to are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from tests.trainer.models import tiny_model
from trainer.run.data_parallel import freeze_unused_parameters


def test_a_vision_tower_is_frozen_and_said(caplog: pytest.LogCaptureFixture) -> None:
    config = Gemma3Config(
        text_config={
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    )
    model = Gemma3ForConditionalGeneration(config)
    assert freeze_unused_parameters(model) is False
    frozen = {name for name, each in model.named_parameters() if not each.requires_grad}
    assert frozen == {
        name for name, _ in model.named_parameters() if "vision_tower" in name or "projector" in name
    }
    assert f"{len(frozen)} of " in caplog.text


def test_all_of_a_language_model_is_trained() -> None:
    model = tiny_model("gpt2")
    assert freeze_unused_parameters(model) is False
    assert all(each.requires_grad for each in model.parameters())


class _Routed(nn.Module):
    """A feed-forward layer of two experts; no token of the test is sent to the second."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.experts = nn.ModuleList([layer, nn.Linear(32, 32, dtype=torch.float64)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.experts[0](hidden)
        return out


def test_an_expert_that_no_token_was_sent_to_stays_trained() -> None:
    model = tiny_model("llama")
    layer = model.model.layers[0]
    layer.mlp = _Routed(layer.mlp)
    assert freeze_unused_parameters(model) is True
    assert all(each.requires_grad for each in model.parameters())

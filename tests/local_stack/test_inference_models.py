"""Models that the embedded server takes, refuses, or runs in another precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from local_stack.inference import Engine, EngineSettings
from local_stack.inference.errors import UnsupportedModel
from local_stack.inference.model import Model
from tests.conftest import RunningInferenceServer
from tests.local_stack.inference_reference import Reference

PROMPT = [1, 87, 85, 71, 84, 201]
SIZES = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
}


def make_model(tiny: Path, directory: Path, kind: str, **settings: Any) -> Path:
    """A random model of another architecture with the tiny model's tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | settings)))
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32, "tie_word_embeddings": False}),
        ("mistral", {"sliding_window": 64}),
        ("gemma2", {"head_dim": 16, "sliding_window": 64}),
    ],
)
def test_other_architectures_are_served_with_their_own_logprobs(
    tiny_model_directory: Path,
    tmp_path: Path,
    start_inference_server: Callable[..., RunningInferenceServer],
    kind: str,
    settings: dict[str, Any],
) -> None:
    directory = make_model(tiny_model_directory, tmp_path / kind, kind, **settings)
    server = start_inference_server(directory)
    assert server.engine.max_model_len == settings.get("sliding_window", 256)
    (choice,) = server.complete(PROMPT, max_tokens=20, ignore_eos=True)
    expected = Reference(directory).logprobs(PROMPT, choice["token_ids"])
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=2e-4)


def test_a_context_longer_than_the_models_is_refused(tiny_model_directory: Path) -> None:
    with pytest.raises(UnsupportedModel, match="more than the model's 2048"):
        Engine(EngineSettings(model=str(tiny_model_directory), max_model_len=2049))


class BlindModel(torch.nn.Module):
    """Looks at no mask: padding counts as text."""

    def __init__(self, real: Any) -> None:
        super().__init__()
        self.real = real

    def forward(self, *, attention_mask: torch.Tensor | None = None, **inputs: Any) -> Any:
        return self.real(**inputs)


def test_a_model_for_which_padding_changes_the_result_is_refused(tiny_model_directory: Path) -> None:
    model = Model(EngineSettings(model=str(tiny_model_directory)))
    model.module = BlindModel(model.module)
    with pytest.raises(UnsupportedModel, match="other log-probs in a padded batch"):
        model.check_padding()

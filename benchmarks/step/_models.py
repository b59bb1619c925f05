"""Models to measure with: the demonstration's, a directory, or random weights of a known shape."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config

from local_stack.models import make_tiny_model, prepare_demo_model

__all__ = ["MODELS", "qwen3_600m_config", "resolve_model"]

MODELS = ("demo", "qwen3-0.6b-random", "tiny")


def resolve_model(name: str, scratch: Path) -> Path:
    """The directory of a model.

    Args:
        name: `demo` (SmolLM2-135M), `qwen3-0.6b-random`, `tiny`, or a directory.
        scratch: Where random models are written.

    Raises:
        FileNotFoundError: There is no such directory.
    """
    if name == "demo":
        return prepare_demo_model()
    if name == "tiny":
        return make_tiny_model(scratch / "tiny")
    if name == "qwen3-0.6b-random":
        return write_random_model(qwen3_600m_config(), scratch / name)
    if not Path(name).is_dir():
        raise FileNotFoundError(f"--model {name!r} is neither a directory nor one of {', '.join(MODELS)}")
    return Path(name)


def qwen3_600m_config() -> Qwen3Config:
    """The shape of Qwen3-0.6B: 596 million parameters, the embedding shared with the head."""
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
    )


def write_random_model(config: PretrainedConfig, directory: Path, *, seed: int = 0) -> Path:
    """Write a model with random weights, and some tokenizer beside it, which no token here comes from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    tiny = make_tiny_model(directory.with_name(f"{directory.name}-tokenizer"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, directory / name)
    return directory

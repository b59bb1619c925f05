"""Tiny random models of several architectures, and samples to run through them."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trainer.model.base_checkpoint import BaseCheckpoint, read_base
from trainer.model.weight_stream import WeightStream
from trainer.model.wrappers import unwrap, weights_by_name
from trainer.samples.sample import Sample

VOCABULARY = 97


class _ExactRotary(nn.Module):
    """Rotary angles in float64: the cosines and sines that transformers computes in float32."""

    def __init__(self, inverse_frequencies: Tensor) -> None:
        super().__init__()
        self.register_buffer("inverse_frequencies", inverse_frequencies.double(), persistent=False)

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].double() * self.inverse_frequencies
        both = torch.cat([angles, angles], dim=-1)
        return both.cos().to(hidden.dtype), both.sin().to(hidden.dtype)


class _ExactNorm(nn.Module):
    """Root-mean-square norm that stays in float64, where transformers goes by way of float32."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.epsilon)


def make_exact(model: PreTrainedModel) -> PreTrainedModel:
    """Let a float64 model compute in float64 throughout.

    transformers computes rotary angles and root-mean-square norms in float32 whatever the model's type. The
    last bit of an angle depends on the column its token stands in (vectorised against scalar code), which
    would hide every difference below 1e-7 that packing makes.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RotaryEmbedding"):
                setattr(parent, name, _ExactRotary(child.inv_freq))
            elif type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, _ExactNorm(child.weight, child.variance_epsilon))
    return model


def tiny_model(
    architecture: str,
    *,
    dtype: torch.dtype = torch.float64,
    attention: str = "sdpa",
    longest: int = 128,
) -> PreTrainedModel:
    torch.manual_seed(0)
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": longest,
        "attn_implementation": attention,
    }
    if architecture == "llama":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**common, tie_word_embeddings=True))
    elif architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**common))
    elif architecture == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**common, head_dim=16))
    elif architecture == "mistral":
        model = MistralForCausalLM(MistralConfig(**common, sliding_window=8))
    elif architecture == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=longest,
                n_embd=32,
                n_layer=2,
                n_head=4,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                attn_implementation=attention,
            )
        )
    else:
        raise ValueError(architecture)
    return model.to(dtype)


def make_sample(
    tokens: list[int],
    trained_from: int,
    *,
    advantage: float = 1.0,
    group_index: int = 0,
    temperature: float = 1.0,
    inference_logprob: float | None = None,
) -> Sample:
    mask = torch.zeros(len(tokens))
    mask[max(trained_from, 1) :] = 1.0
    return Sample(
        tokens=torch.tensor(tokens),
        loss_mask=mask,
        advantages=mask * advantage,
        inference_logprobs=None
        if inference_logprob is None
        else torch.where(mask > 0, inference_logprob, 1.0),
        ref_logprobs=None,
        temperature=temperature,
        score=advantage,
        env_id=0,
        group_index=group_index,
    )


def random_tree_samples(seed: int, *, count: int = 9, longest: int = 40) -> list[Sample]:
    """Sequences that share prefixes of random depth, with random masks and advantages; some are equal."""
    generator = random.Random(seed)
    sequences: list[list[int]] = []
    for _ in range(count):
        parent = generator.choice(sequences) if sequences and generator.random() < 0.8 else []
        kept = parent[: generator.randint(0, len(parent))]
        added = generator.randint(0 if len(kept) > 1 else 2, 12)
        sequences.append((kept + [generator.randrange(VOCABULARY) for _ in range(added)])[:longest])
    samples = []
    for tokens in sequences:
        sample = make_sample(tokens, 1)
        mask = torch.tensor([float(generator.random() < 0.6) for _ in tokens])
        mask[0] = 0.0
        advantages = mask * torch.tensor([generator.uniform(-2, 2) for _ in tokens])
        samples.append(
            Sample(
                tokens=sample.tokens,
                loss_mask=mask,
                advantages=advantages,
                inference_logprobs=torch.where(mask > 0, -generator.random(), 1.0),
                ref_logprobs=None,
                temperature=generator.choice([1.0, 1.0, 0.75]),
                score=generator.random(),
                env_id=0,
                group_index=0,
            )
        )
    return samples


@st.composite
def forests(draw: st.DrawFn) -> list[Sample]:
    """A step's samples: any mixture of groups, depths, lengths, masks and turns, at least one token trained.

    Each sequence goes on from any prefix of any other, or starts afresh; a few letters make chance matches
    likely. Sequences of several turns have masks that change along the way.
    """
    letters = draw(st.sampled_from([2, 5, VOCABULARY]))
    token = st.integers(0, letters - 1)
    sequences: list[list[int]] = []
    samples: list[Sample] = []
    for _ in range(draw(st.integers(1, 8))):
        parent = draw(st.sampled_from(sequences)) if sequences and draw(st.booleans()) else []
        kept = parent[: draw(st.integers(0, len(parent)))]
        grown = draw(st.lists(token, min_size=0 if len(kept) > 1 else 2, max_size=40))
        sequences.append((kept + grown)[:100])
        tokens = sequences[-1]
        generator = random.Random(draw(st.integers(0, 1 << 16)))
        turns = sorted(generator.randrange(1, len(tokens)) for _ in range(draw(st.integers(1, 4))))
        mask = torch.tensor([float(sum(turn <= t for turn in turns) % 2) for t in range(len(tokens))])
        sample = make_sample(
            tokens,
            1,
            group_index=draw(st.integers(0, 2)),
            temperature=draw(st.sampled_from([1.0, 1.0, 0.75])),
        )
        advantages = mask * torch.tensor([generator.uniform(-2, 2) for _ in tokens])
        samples.append(replace(sample, loss_mask=mask, advantages=advantages))
    assume(any(sample.trained_tokens for sample in samples))
    return samples


def cast_weights(weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Cast tensors, those that share memory together."""
    cast: dict[int, Tensor] = {}
    return {
        name: cast.setdefault(tensor.data_ptr(), tensor.to(dtype or tensor.dtype))
        for name, tensor in weights.items()
    }


def base_of(model: nn.Module, dtype: torch.dtype | None = None) -> BaseCheckpoint:
    """Return a base that `model` could have been loaded from, as transformers itself writes it.

    Args:
        model: Perhaps inside wrappers; adapters are left out.
        dtype: Of the base's floating-point tensors. None: the model's.
    """
    inner = unwrap(model)
    with tempfile.TemporaryDirectory() as directory:
        inner.save_pretrained(directory, state_dict=cast_weights(weights_by_name(inner), dtype))
        return read_base(directory)


def stream_of(model: nn.Module, dtype: torch.dtype | None = None, **options: Any) -> WeightStream:
    """Return the stream of a model, written like a base of its own in `dtype`."""
    return WeightStream(model, base_of(model, dtype), **options)


def with_adapter(model: nn.Module | None = None, **options: Any) -> Any:
    """A model, or a tiny one, with an adapter as training begins with: the second factor is zero."""
    peft = pytest.importorskip("peft", reason="adapters need the optional peft")
    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "down_proj"]
    settings = {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM"}
    model = tiny_model("llama", dtype=torch.float32) if model is None else model
    return peft.get_peft_model(model, peft.LoraConfig(**(settings | options)))


def change_adapter(model: nn.Module, seed: int) -> None:
    """Give a model other weights, in its adapter only."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)

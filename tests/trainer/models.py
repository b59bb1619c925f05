"""Tiny random models of several architectures, and samples to run through them."""

from __future__ import annotations

import random

import torch
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
)

from trainer.samples import Sample

VOCABULARY = 97


def tiny_model(
    architecture: str, *, dtype: torch.dtype = torch.float64, attention: str = "sdpa"
) -> PreTrainedModel:
    torch.manual_seed(0)
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "attn_implementation": attention,
    }
    if architecture == "llama":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**common, tie_word_embeddings=True))
    elif architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**common))
    elif architecture == "mistral":
        model = MistralForCausalLM(MistralConfig(**common, sliding_window=8))
    elif architecture == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=128,
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

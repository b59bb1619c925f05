"""The trainer's own scores of the probes, and the probes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoTokenizer

from tests.trainer.models import tiny_model
from trainer.errors import ConfigurationError
from trainer.publish import make_probes, score_with_model
from trainer.publish.verification.probes import CHAT, MAX_TOKENS, TEXTS

SEQUENCES = [[5, 17, 3, 88, 42], [1, 2], [7] * 30]


def test_scores_match_a_float64_reference() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    scores = score_with_model(model, SEQUENCES, "cpu")
    assert [len(row) for row in scores] == [4, 1, 29]
    for tokens, row in zip(SEQUENCES, scores, strict=True):
        logits = model(input_ids=torch.tensor([tokens])).logits[0].detach().double()
        for position, score in enumerate(row):
            candidates = logits[position].tolist()
            highest = max(candidates)
            normalizer = highest + math.log(math.fsum(math.exp(value - highest) for value in candidates))
            assert score == pytest.approx(candidates[tokens[position + 1]] - normalizer, abs=1e-6)


def test_weights_are_scored_in_float32_even_where_accelerate_trains_in_bfloat16() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    before = score_with_model(model, SEQUENCES, "cpu")
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    tokens = torch.tensor([SEQUENCES[0]])
    rounded = torch.log_softmax(prepared(input_ids=tokens).logits[0, :-1], dim=-1)
    exact = torch.tensor(before[0])
    assert not torch.allclose(rounded.gather(-1, tokens[0, 1:, None])[:, 0], exact, atol=1e-5, rtol=0)
    assert score_with_model(model, SEQUENCES, "cpu") == before


def test_dropout_is_off_while_scoring_and_every_module_gets_its_mode_back() -> None:
    model = tiny_model("gpt2", dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.train()
    model.transformer.h[0].eval()  # e.g. a frozen part
    before = [module.training for module in model.modules()]
    assert score_with_model(model, SEQUENCES, "cpu") == score_with_model(model, SEQUENCES, "cpu")
    assert [module.training for module in model.modules()] == before
    assert True in before
    assert False in before


def test_scoring_draws_no_random_number_and_leaves_no_gradient() -> None:
    model = tiny_model("llama", dtype=torch.float32).train()
    state = torch.get_rng_state()
    score_with_model(model, SEQUENCES, "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_are_restored_even_if_scoring_fails() -> None:
    model = tiny_model("llama", dtype=torch.float32).train()
    with pytest.raises(IndexError):
        score_with_model(model, [[1, 10**6]], "cpu")
    assert model.training


def test_the_built_in_probes_are_varied_short_and_include_a_chat(tiny_model_directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_directory)
    probes = make_probes(tokenizer).texts
    assert len(probes) == len(TEXTS) + 1
    assert all(20 <= len(probe) <= MAX_TOKENS for probe in probes)
    chat = tokenizer.decode(probes[-1])
    assert chat.startswith("<|im_start|>user")
    assert CHAT[:20] in chat
    assert len({tuple(probe[:4]) for probe in probes}) == len(probes)


@pytest.mark.parametrize(
    "template", ["", " ", "{{ raise_exception('only tools') }}", "{{ date.today() }}", "{% for %}"]
)
def test_a_chat_template_that_writes_nothing_or_fails_leaves_the_other_probes(
    template: str, tiny_model_directory: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_directory)
    others = make_probes(tokenizer).texts[:-1]
    tokenizer.chat_template = template
    assert make_probes(tokenizer).texts == others


def test_own_texts_replace_the_built_in_ones(tiny_model_directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_directory)
    assert make_probes(tokenizer, ["2+2=4"]).texts == [tokenizer.encode("2+2=4")]


def test_a_probe_without_a_token_to_score_is_refused(tiny_model_directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_directory)
    with pytest.raises(ConfigurationError, match=r"publish\.probes\[1\] has 1 tokens"):
        make_probes(tokenizer, ["fine", "x"])
    with pytest.raises(ConfigurationError, match=r"publish\.probes is empty"):
        make_probes(tokenizer, [])

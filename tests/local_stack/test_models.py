"""The models that need no hub."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from local_stack.models import default_cache_directory, make_tiny_model, prepare_demo_model
from tests.forked import PROCESSES

CONVERSATION = [{"role": "user", "content": "What is 2+2?"}]


def test_the_tiny_model_is_an_ordinary_checkpoint(tiny_model_directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_directory)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_directory)
    assert model.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size == 259
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    text = "any text: é 日本 \n\t<|im_start|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    rendered = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode("<|im_start|>a<|im_end|>")[::2] == [1, 2]


def test_the_tiny_model_depends_on_its_seed_alone(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    one, two, other = (
        make_tiny_model(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = [load_file(path / "model.safetensors") for path in (one, two, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["model.embed_tokens.weight"], weights[2]["model.embed_tokens.weight"])


def test_an_existing_directory_is_kept(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path / "tiny")
    before = (directory / "model.safetensors").read_bytes()
    assert make_tiny_model(directory, seed=5) == directory
    assert (directory / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_every_user_can_read_a_model_that_another_one_prepared(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        directory = make_tiny_model(tmp_path / "tiny")
    finally:
        os.umask(before)
    assert directory.stat().st_mode & 0o777 == 0o755
    assert {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()} == {
        path.name: 0o644 for path in directory.iterdir()
    }


def test_processes_that_make_the_same_directory_at_once_all_succeed(tmp_path: Path) -> None:
    with PROCESSES.Pool(2) as pool:
        results = pool.map(make_tiny_model, [tmp_path / "tiny"] * 2)
    assert results == [tmp_path / "tiny"] * 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "tiny") is not None
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_the_cache_follows_the_desktop_convention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_directory() == tmp_path / "atropos-trainer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_directory() == Path.home() / ".cache" / "atropos-trainer"


@pytest.mark.slow
def test_the_demo_model_answers_a_simple_question() -> None:
    directory = prepare_demo_model()
    config = json.loads((directory / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["eos_token_id"], config["rms_norm_eps"], config["rope_theta"]) == (2, 1e-5, 100_000.0)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert [tokenizer.decode([token]) for token in tokenizer.encode("12+3")] == ["1", "2", "+", "3"]
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.dtype == torch.float32
    prompt = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert "4" in answer
    assert answer.endswith("<|im_end|>")

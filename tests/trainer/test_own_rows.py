"""Each process of a run whose weights are spread reads its own rows alone, with the bits of a whole load."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.forked import forked_ranks
from tests.trainer.batches import VOCABULARY
from tests.trainer.test_sharding import run_in_processes
from trainer.config import load_config
from trainer.model.load import load_policy

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 50,  # which 4 does not divide
    "intermediate_size": 70,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
}


def saved(model: PreTrainedModel, tokenizer: Path, directory: Path, **options: str) -> Path:
    shutil.copytree(tokenizer, directory, ignore=shutil.ignore_patterns("model*", "config.json"))
    model.save_pretrained(directory, **options)
    return directory


def some_models() -> dict[str, PreTrainedModel]:
    """Several kinds of rotary and other buffers, tied and untied heads, a part that no text reaches."""
    torch.manual_seed(0)
    kinds = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    gemma = Gemma3TextConfig(**SIZES, num_hidden_layers=4, layer_types=kinds, sliding_window=512)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    seeing = Gemma3Config(text_config=gemma.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    return {
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**SIZES, num_hidden_layers=3, tie_word_embeddings=False)),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=2)),
        "gemma3": Gemma3ForCausalLM(gemma),
        "gemma3-seeing": Gemma3ForConditionalGeneration(seeing),
    }


@pytest.mark.parametrize("count", [2, 4])
def test_rows_are_read_alone_and_have_the_bits_of_a_whole_load(
    count: int, tiny_model_directory: Path, tmp_path: Path, free_port: int
) -> None:
    """Also in bfloat16 and in several files, with adapters, and where weights are refused."""
    directories = [tiny_model_directory]
    for name, model in some_models().items():
        directories.append(saved(model, tiny_model_directory, tmp_path / name))
    half = Qwen3ForCausalLM(Qwen3Config(**SIZES, num_hidden_layers=3)).to(torch.bfloat16)
    directories.append(saved(half, tiny_model_directory, tmp_path / "half", max_shard_size="60KB"))
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 1
    no_numbers = tmp_path / "no_numbers"
    shutil.copytree(tmp_path / "qwen3", no_numbers)
    tensors = load_file(no_numbers / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][-1, -1] = torch.nan  # of the last process
    save_file(tensors, no_numbers / "model.safetensors", metadata={"format": "pt"})

    log = tmp_path / "log"
    words = [no_numbers, *directories]
    ranks = forked_ranks(count, free_port, "tests.trainer.reading_rows", words, stdout=log, stderr=log)
    try:
        assert [rank.wait(120) for rank in ranks] == [0] * count, log.read_text()[-5000:]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.slow
def test_tensors_that_are_not_the_models_end_all_processes_with_one_line(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    tensors = load_file(tiny_model_directory / "model.safetensors")
    fewer = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    others = {
        "missing": (fewer, "1 missing from it: model.norm.weight"),
        "surplus": (tensors | {"model.more.weight": torch.ones(3)}, "1 not of this model: model.more.weight"),
        "shaped": (tensors | {"model.norm.weight": torch.ones(3)}, "1 of another shape: model.norm.weight"),
    }
    runs = []
    for name, (changed, _) in others.items():
        shutil.copytree(tiny_model_directory, tmp_path / name)
        save_file(changed, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        output, options = str(tmp_path / f"run-{name}"), ["--parallel.mode", "sharded"]
        runs.append({"model": str(tmp_path / name), "output": output, "options": options, "steps": 1})
    run_in_processes(2, runs, tmp_path / "log")
    for name, (_, message) in others.items():
        for rank in range(2):
            (line,) = (tmp_path / f"run-{name}.refused-{rank}").read_text().splitlines()
            assert line.startswith("ConfigurationError: model.path")
            assert message in line
        assert not (tmp_path / f"run-{name}/checkpoints").exists()


def test_what_is_converted_or_stored_twice_is_loaded_whole_and_that_is_said(
    tiny_model_directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = SIZES | {"hidden_size": 32}
    experts = MixtralForCausalLM(MixtralConfig(**sizes, num_hidden_layers=2, num_local_experts=4))
    twice = tmp_path / "twice"
    shutil.copytree(tiny_model_directory, twice)
    tensors = load_file(twice / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, twice / "model.safetensors", metadata={"format": "pt"})
    for directory in (saved(experts, tiny_model_directory, tmp_path / "experts"), twice):
        config = load_config(None, ["--model.path", str(directory)], environment={})
        with caplog.at_level(logging.WARNING):
            policy = load_policy(config.model, config.data, rows_only=True)
        assert policy.loaded.rows is None
        assert not any(parameter.is_meta for parameter in policy.model.parameters())
        assert f"Each process loads the whole of {directory}" in caplog.text

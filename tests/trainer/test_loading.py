"""A checkpoint is loaded exactly, or refused before anything is written."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from tests.trainer.batches import VOCABULARY, make_bodies
from tests.trainer.runs import rows, run
from trainer.check._local import check_model, check_start
from trainer.cli._logging import configure_logging
from trainer.config import load_config
from trainer.errors import ConfigurationError
from trainer.model.load import dropout_rates, inspect_model, load_policy
from trainer.model.select_packing import choose_packing
from trainer.model.tokenizer import require_directory_or_hub_id

Tensors = dict[str, torch.Tensor]

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture
def changed_checkpoint(tiny_model_directory: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny model with other tensors, or another configuration."""

    def change(tensors: Callable[[Tensors], Tensors] = dict, **configuration: Any) -> Path:
        directory = tmp_path / "model"
        shutil.copytree(tiny_model_directory, directory)
        file = directory / "model.safetensors"
        save_file(tensors(load_file(file)), file, metadata={"format": "pt"})
        description = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(description | configuration))
        return directory

    return change


def saved(model: PreTrainedModel, tokenizer: Path, directory: Path) -> Path:
    """Write `model`, with the tokenizer of another directory."""
    model.save_pretrained(directory)
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, directory)
    return directory


def prefixed(tensors: Tensors) -> Tensors:
    return {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}


def without_a_layer(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}


@pytest.mark.parametrize(
    ("tensors", "configuration", "words"),
    [
        (prefixed, {}, ["21 missing from it: lm_head.weight", "_orig_mod.model.embed", "wrapper"]),
        (without_a_layer, {}, ["9 missing from it: model.layers.1.input_layernorm.weight"]),
        (dict, {"num_hidden_layers": 1}, ["9 not of this model: model.layers.1.input_layernorm"]),
        (dict, {"num_hidden_layers": 3}, ["9 missing from it: model.layers.2.input_layernorm"]),
        (
            dict,
            {"intermediate_size": 64},
            ["6 of another shape: model.layers.0.mlp.down_proj.weight [64, 128] instead of [64, 64]"],
        ),
    ],
)
def test_tensors_that_are_not_the_models_are_named_and_nothing_is_written(
    changed_checkpoint: Callable[..., Path],
    tmp_path: Path,
    tensors: Callable[[Tensors], Tensors],
    configuration: dict[str, Any],
    words: list[str],
) -> None:
    model = changed_checkpoint(tensors, **configuration)
    with pytest.raises(ConfigurationError) as refused:
        run(model, tmp_path / "run", make_bodies(1), steps=1)
    assert [word for word in [str(model), *words] if word not in str(refused.value)] == []
    assert not (tmp_path / "run").exists()
    config = load_config(None, ["--model.path", str(model)], environment={})
    with pytest.raises(ConfigurationError, match="not those that its config"):
        load_policy(config.model, config.data)  # the weights themselves, as from the hub


def test_what_an_architecture_ignores_or_ties_is_no_difference(
    changed_checkpoint: Callable[..., Path],
) -> None:
    def older(tensors: Tensors) -> Tensors:
        more = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in (0, 1)}
        return tensors | more | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    config = load_config(None, ["--model.path", str(changed_checkpoint(older))], environment={})
    assert inspect_model(config.model) is not None
    load_policy(config.model, config.data)


def test_experts_that_transformers_merges_are_each_accounted_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4)).save_pretrained(tmp_path)
    config = load_config(None, ["--model.path", str(tmp_path)], environment={})
    assert inspect_model(config.model) is not None
    file = tmp_path / "model.safetensors"
    fewer = {name: tensor for name, tensor in load_file(file).items() if "experts.3" not in name}
    save_file(fewer, file, metadata={"format": "pt"})
    with pytest.raises(
        ConfigurationError, match=r"of another shape: .*\[3, 32, 48\] instead of \[4, 32, 48\]"
    ):
        inspect_model(config.model)


def test_an_adapter_beside_the_model_is_named(
    changed_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = changed_checkpoint()
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    with pytest.raises(ConfigurationError, match=rf"{model}/adapter_config\.json lies beside the model"):
        run(model, tmp_path / "run", make_bodies(1), steps=1)
    (model / "config.json").unlink()
    with pytest.raises(ConfigurationError, match=r"holds an adapter .* and no model"):
        run(model, tmp_path / "run", make_bodies(1), steps=1)


@pytest.mark.parametrize("lora", [(), ("--model.lora.rank", "4")])
def test_a_base_that_was_removed_before_resuming_is_named(
    changed_checkpoint: Callable[..., Path], tmp_path: Path, lora: tuple[str, ...]
) -> None:
    model = changed_checkpoint()
    run(model, tmp_path / "run", make_bodies(1), *lora, steps=1)
    shutil.rmtree(model)
    with pytest.raises(ConfigurationError, match=rf"model\.path '{model}' cannot be used: it does not exist"):
        run(model, tmp_path / "run", make_bodies(1), *lora, steps=2)


def test_what_begins_like_a_directory_here_is_a_path_and_the_hub_is_not_asked_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for gone in ("runs/first", "./first", "~/first"):
        with pytest.raises(ConfigurationError, match=rf"'{gone}' cannot be used: it does not exist"):
            require_directory_or_hub_id("model.path", gone)
    require_directory_or_hub_id("model.path", "somebody/first")


def test_adapters_are_not_resumed_on_other_weights_of_the_same_shape(
    changed_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    model = changed_checkpoint()
    run(model, tmp_path / "run", make_bodies(1), "--model.lora.rank", "4", steps=1)
    file = model / "model.safetensors"
    other = load_file(file)
    other["model.norm.weight"][0] += 0.01
    save_file(other, file, metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match="were trained on other base weights"):
        run(model, tmp_path / "run", make_bodies(1), "--model.lora.rank", "4", steps=2)


def encoders() -> Iterator[PreTrainedModel]:
    yield BertLMHeadModel(BertConfig(**SMALL))
    yield RobertaForCausalLM(RobertaConfig(**SMALL))


def test_encoders_are_refused_and_the_same_as_decoders_are_not() -> None:
    torch.manual_seed(0)
    for model in encoders():
        with pytest.raises(ConfigurationError, match="is no causal language model"):
            choose_packing(model, "padded")
    choose_packing(BertLMHeadModel(BertConfig(**SMALL, is_decoder=True)), "padded")


def unusual() -> Iterator[PreTrainedModel]:
    """Without attention, or with a width for each layer."""
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    few = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, **special}
    yield MambaForCausalLM(MambaConfig(**few, state_size=4))
    yield RwkvForCausalLM(RwkvConfig(**few, attention_hidden_size=32, context_length=64))
    layers = {"intermediate_size": [32, 48], "layer_types": ["sliding_attention", "full_attention"]}
    yield Gemma3nForCausalLM(
        Gemma3nTextConfig(
            **(SMALL | layers | special),
            num_key_value_heads=2,
            head_dim=8,
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=0,
            laurel_rank=4,
            activation_sparsity_pattern=[0.0, 0.0],
        )
    )


def test_models_without_attention_and_with_widths_by_layer_train(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    for model in unusual():
        name = type(model).__name__
        directory = saved(model, tiny_model_directory, tmp_path / name)
        run(directory, tmp_path / f"run-{name}", make_bodies(1), steps=1)
        (row,) = rows(tmp_path / f"run-{name}")
        assert row["trained_tokens"], name


def on_policy_body(model: PreTrainedModel) -> bytes:
    """A batch whose inference log-probs are the model's own, computed as a sampler does."""
    batch = json.loads(make_bodies(1)[0])
    model.eval()
    for group in batch["batch"]:
        for tokens, masks, logprobs in zip(
            group["tokens"], group["masks"], group["inference_logprobs"], strict=True
        ):
            ids = torch.tensor([tokens])
            with torch.no_grad():
                scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            for place, score in enumerate(scores.flatten().tolist(), start=1):
                logprobs[place] = score if masks[place] != -100 else 1.0
    return json.dumps(batch).encode()


def test_dropout_of_the_model_is_off_unless_it_is_to_be_kept(
    tiny_model_directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3
        )
    )
    directory = saved(model, tiny_model_directory, tmp_path / "gpt2")
    body = on_policy_body(model)
    caplog.set_level(logging.INFO)
    found = {}
    for dropout in ("none", "keep"):
        output = tmp_path / dropout
        run(directory, output, [body], "--model.dropout", dropout, "--loss.name", "ppo_clip", steps=1)
        (found[dropout],) = rows(output)
    assert found["none"]["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert found["none"]["clipped"] == 0.0
    assert found["none"]["mismatch_difference"] < 1e-5
    assert found["keep"]["mismatch_difference"] > 0.1  # or this test would find nothing
    said = [record.getMessage() for record in caplog.records if "dropout is off" in record.getMessage()]
    assert len(said) == 1
    assert "GPT2Config.resid_pdrop 0.1" in said[0]


def test_adapters_keep_their_own_dropout(changed_checkpoint: Callable[..., Path]) -> None:
    pytest.importorskip("peft")
    words = ("--model.path", str(changed_checkpoint(attention_dropout=0.2)), "--model.lora.dropout", "0.25")
    config = load_config(None, words, environment={})
    rates = dropout_rates(load_policy(config.model, config.data).model)
    assert set(rates.values()) == {0.25}


def test_what_peft_asks_by_an_old_name_does_not_reach_the_screen(tiny_model_directory: Path) -> None:
    pytest.importorskip("peft")
    words = ("--model.path", str(tiny_model_directory), "--model.lora.rank", "4")
    config = load_config(None, words, environment={})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        configure_logging("ERROR")
        load_policy(config.model, config.data)


def checked(model: Path, output: Path, *words: str) -> list[str]:
    """What `atropos-train check` says about the model and the start of a run, in its words."""
    config = load_config(
        None, ["--model.path", str(model), "--train.output_dir", str(output), *words], environment={}
    )
    results, _ = check_model(config)
    if results[0].status != "failed":
        results = [*results, check_start(config)]
    return [f"{result.status}: {result.found}" for result in results]


def test_check_finds_what_a_start_would_refuse_without_a_run(
    changed_checkpoint: Callable[..., Path], tiny_model_directory: Path, tmp_path: Path
) -> None:
    whole = checked(tiny_model_directory, tmp_path / "none")
    assert [line.partition(":")[0] for line in whole] == ["ok", "ok"]
    assert "every tensor accounted for" in whole[0]
    assert "no token changes the log-probs" in whole[-1]
    model = changed_checkpoint(prefixed)
    assert "failed" in checked(model, tmp_path / "none")[0]
    (model / "adapter_config.json").write_text("{}")
    assert "adapter_config.json lies beside the model" in checked(model, tmp_path / "none")[0]
    torch.manual_seed(0)
    encoder = saved(BertLMHeadModel(BertConfig(**SMALL)), tiny_model_directory, tmp_path / "bert")
    assert "no causal language model" in checked(encoder, tmp_path / "none")[-1]
    assert not (tmp_path / "none").exists()
    run(tiny_model_directory, tmp_path / "run", make_bodies(1), steps=1)
    assert "optimizer.epsilon: 1e-08 in" in checked(
        tiny_model_directory, tmp_path / "run", "--optimizer.epsilon", "1e-7"
    )[-1].replace("\n", " ")


def test_check_reads_a_vision_configuration(tiny_model_directory: Path, tmp_path: Path) -> None:
    text = SMALL | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**text),
        vision_config=vision | {"image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_index=VOCABULARY - 1,
    )
    torch.manual_seed(0)
    directory = saved(Gemma3ForConditionalGeneration(config), tiny_model_directory, tmp_path / "gemma3")
    said = checked(directory, tmp_path / "none")
    assert f"vocabulary {VOCABULARY}" in said[0]
    assert said[-1].startswith("ok")

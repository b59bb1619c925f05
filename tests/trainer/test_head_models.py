"""Real models of transformers: log-probs without logits are those of the model's own logits."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
)

from tests.trainer.models import VOCABULARY, random_tree_samples, tiny_model
from trainer.errors import ConfigurationError
from trainer.model.lm_head import LogitTransform
from trainer.model.lm_head.select import choose_head, is_plain_linear
from trainer.model.token_logprobs import TokenLogProbs, token_logprobs
from trainer.packing import MicroBatch, Packing, pack

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "attn_implementation": "eager",
}


def model_of(architecture: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A tiny random model whose logits are large enough for a cap to bend them."""
    torch.manual_seed(0)
    model: PreTrainedModel
    if architecture == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0))
    elif architecture == "granite":
        model = GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=6.0))
    elif architecture == "cohere":
        model = CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.0625))
    elif architecture == "falcon_h1":
        small = SMALL | {"num_hidden_layers": 1, "lm_head_multiplier": 0.3}
        model = FalconH1ForCausalLM(
            FalconH1Config(**small, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_state=8, mamba_chunk_size=16)
        )
    elif architecture == "gptj":  # its head has a bias
        model = GPTJForCausalLM(
            GPTJConfig(vocab_size=VOCABULARY, n_positions=128, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
        )
        nn.init.normal_(model.lm_head.bias)
    else:
        model = tiny_model(architecture)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model.to(dtype)


TRANSFORMS = {
    "llama": LogitTransform(),  # tied
    "qwen2": LogitTransform(),  # untied
    "gpt2": LogitTransform(),  # tied
    "gptj": LogitTransform(),
    "gemma2": LogitTransform(cap=2.0),
    "granite": LogitTransform(scale=1 / 6),
    "cohere": LogitTransform(scale=0.0625),
    "falcon_h1": LogitTransform(scale=0.3),
}


def make_batch(packing: Packing = "padded", seed: int = 3) -> MicroBatch:
    samples = [sample for sample in random_tree_samples(seed) if sample.trained_tokens]
    (batch,) = pack(samples, [7.0] * len(samples), packing=packing, tokens_per_micro_batch=100_000)
    return batch


def gradients(model: nn.Module, batch: MicroBatch, scores: TokenLogProbs) -> dict[str, Tensor]:
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    loss = -(scores.logprobs * batch.advantages / batch.denominator).sum()
    if scores.entropy.requires_grad:
        loss = loss - 0.3 * (scores.entropy * batch.loss_mask / batch.denominator).sum()
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(trained.items(), found, strict=True)
    }


def assert_like_own_logits(model: nn.Module, batch: MicroBatch, tolerance: float = 1e-10) -> None:
    head = choose_head(model, "tiled")
    assert head is not None
    for entropy_gradient in (False, True):
        ours, own = (
            token_logprobs(model, batch, use_temperature=True, head=each, entropy_gradient=entropy_gradient)
            for each in (head, None)
        )
        assert ours.entropy.requires_grad is own.entropy.requires_grad is entropy_gradient
        for name in ("logprobs", "entropy"):
            found, expected = getattr(ours, name), getattr(own, name)
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        wanted = gradients(model, batch, own)
        scale = max(float(value.abs().max()) for value in wanted.values())
        for name, gradient in gradients(model, batch, ours).items():
            assert float((gradient - wanted[name]).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("architecture", TRANSFORMS)
def test_logprobs_and_gradients_are_those_of_the_models_own_logits(architecture: str) -> None:
    model = model_of(architecture)
    assert is_plain_linear(model.get_output_embeddings())
    assert_like_own_logits(model, make_batch())


@pytest.mark.parametrize("architecture", TRANSFORMS)
def test_what_a_model_does_to_its_logits_is_measured(architecture: str) -> None:
    head = choose_head(model_of(architecture, torch.float32), "tiled")
    assert head is not None
    expected = TRANSFORMS[architecture]
    assert head.scale == pytest.approx(expected.scale, rel=1e-6)
    assert head.cap == (None if expected.cap is None else pytest.approx(expected.cap, rel=1e-6))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_a_prefix_tree_shares_predictions_between_branches(architecture: str) -> None:
    batch = make_batch("prefix_tree")
    predictions = set(zip(batch.predict_row.tolist(), batch.predict_column.tolist(), strict=True))
    assert len(predictions) < len(batch.targets)
    assert_like_own_logits(model_of(architecture), batch)


def adapted(modules: list[str], **options: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM", **options)
    model: nn.Module = peft.get_peft_model(model_of("qwen2"), config).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("options", [{"modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_a_head_that_peft_trains_keeps_the_models_own_logits(options: dict[str, Any]) -> None:
    model = adapted(**({"modules": ["q_proj"]} | options))
    assert choose_head(model, "auto") is None
    with pytest.raises(ConfigurationError, match="the model's head is more than a matrix"):
        choose_head(model, "tiled")
    batch = make_batch()
    own = token_logprobs(model, batch, use_temperature=True, entropy_gradient=True)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    rows = logits[batch.predict_row, batch.predict_column] / batch.temperature[:, None]
    expected = rows.log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0]
    plain = TokenLogProbs(logprobs=expected, entropy=torch.distributions.Categorical(logits=rows).entropy())
    torch.testing.assert_close(own.logprobs, expected)
    torch.testing.assert_close(own.entropy, plain.entropy)
    found, wanted = gradients(model, batch, own), gradients(model, batch, plain)
    assert any("lm_head" in name and bool(gradient.any()) for name, gradient in found.items())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name])


def test_a_frozen_head_beside_adapters_needs_no_gradient() -> None:
    model = adapted(["q_proj"])
    head = model.get_base_model().get_output_embeddings()
    assert is_plain_linear(head)
    assert not head.weight.requires_grad
    assert_like_own_logits(model, make_batch())


def test_under_autocast_logprobs_are_float32_and_near_those_of_the_models_own_logits() -> None:
    model, batch = model_of("qwen2", torch.float32), make_batch()
    head = choose_head(model, "tiled")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = token_logprobs(model, batch, use_temperature=False, head=head)
        own = token_logprobs(model, batch, use_temperature=False)
    assert ours.logprobs.dtype == torch.float32
    torch.testing.assert_close(ours.logprobs, own.logprobs, rtol=1e-5, atol=1e-5)


class LogitsOfNoTransform(LlamaForCausalLM):
    """Adds every logit to the ones after it: no function of a logit alone."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.cumsum(dim=-1)
        return output


class HeadThatIsNotCalled(LlamaForCausalLM):
    """Multiplies by the head's weight without calling the head."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **_: Any) -> Any:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        output.logits = output.last_hidden_state @ self.lm_head.weight.t()
        return output


class HeadOnOtherStates(LlamaForCausalLM):
    """Adds to the logits what an element-wise function cannot see: something of the tokens themselves."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hook = self.lm_head.register_forward_hook(
            lambda _module, given, output: output + given[0].new_ones(1) * output.mean(-2, keepdim=True)
        )
        try:
            return super().forward(*args, **kwargs)
        finally:
            hook.remove()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (LogitsOfNoTransform, "in a way that is no scale and no soft cap"),
        (HeadThatIsNotCalled, "the model does not call its head"),
        (HeadOnOtherStates, "differ by"),
    ],
)
def test_a_model_whose_logits_we_cannot_reproduce_keeps_its_own(
    kind: type[LlamaForCausalLM], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = kind(tiny_model("llama").config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    with caplog.at_level(logging.WARNING):
        assert choose_head(model, "auto") is None
    (record,) = caplog.records
    assert "Taking the model's own logits" in record.message
    assert reason in record.message
    assert not model.lm_head._forward_pre_hooks
    assert not model.lm_head._forward_hooks
    assert model.training
    with pytest.raises(ConfigurationError, match=r"model\.head tiled is not possible here"):
        choose_head(model, "tiled")


def test_the_models_own_logits_can_be_asked_for() -> None:
    assert choose_head(model_of("llama"), "logits") is None


def test_the_head_is_given_nothing_to_compute() -> None:
    model, batch = model_of("llama"), make_batch()
    head = choose_head(model, "tiled")
    shapes = []
    watch = model.lm_head.register_forward_hook(lambda _module, _args, output: shapes.append(output.shape))
    token_logprobs(model, batch, use_temperature=True, head=head)
    watch.remove()
    assert shapes == [(batch.input_ids.shape[0], 0, VOCABULARY)]

"""Sampler against trainer on every batch: exact numbers, whatever the loss, and the alarm."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.trainer.batches import make_body
from tests.trainer.runs import rows, run, weights
from trainer.config import TrainSettings
from trainer.errors import MismatchTooLarge
from trainer.run.logprob_mismatch import (
    Mismatch,
    alarm_text,
    mismatch_sums,
    take_mismatch,
    temperature_text,
    unjudged_text,
)


def of(logprobs: list[float], sampled: list[float], mask: list[float]) -> Mismatch | None:
    entropy = torch.ones(len(logprobs))
    sums = mismatch_sums(torch.tensor(logprobs), torch.tensor(sampled), torch.tensor(mask), entropy)
    return take_mismatch({name: float(value) for name, value in sums.items()})


def test_the_numbers_are_those_of_a_reference_over_the_tokens_that_count() -> None:
    logprobs = [-1.0, -2.0, -3.0, -4.0, -5.0]
    sampled = [-1.1, math.nan, -2.0, 1.0, -5.0]
    found = of(logprobs, sampled, [1, 1, 2, 0, 1])
    assert found is not None
    logs = [0.1, -1.0, 0.0]
    assert found.tokens == 3
    assert found.mean_difference == pytest.approx(math.fsum(map(abs, logs)) / 3)
    assert found.kl == pytest.approx(math.fsum(math.exp(log) - 1 - log for log in logs) / 3, rel=1e-5)
    assert found.large_share == pytest.approx(1 / 3)
    ratios = [math.exp(log) for log in logs]
    assert found.ratio == pytest.approx(math.fsum(ratios) / 3)
    squared = math.fsum(ratio * ratio for ratio in ratios)
    assert found.effective_share == pytest.approx(math.fsum(ratios) ** 2 / (3 * squared), rel=1e-5)


def test_tokens_without_log_probs_do_not_count_and_without_any_there_is_no_mismatch() -> None:
    assert of([-1.0, -2.0], [math.nan, math.nan], [1, 1]) is None
    assert of([-1.0, -2.0], [-1.0, -2.0], [0, 0]) is None


def test_a_log_prob_that_stands_for_minus_infinity_stays_finite() -> None:
    found = of([-1.0], [-9999.0], [1])
    assert found is not None
    assert all(math.isfinite(value) for value in found.metrics().values())
    assert found.large_share == 1.0


def settings(**options: Any) -> TrainSettings:
    return TrainSettings(**options)


@pytest.mark.parametrize("temperature", [0.7, 0.8, 0.95, 1.0, 1.2])
def test_the_samplers_temperature_is_fitted_to_the_differences(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2.5 * torch.randn(4000, 50, generator=generator)
    ours, theirs = logits.log_softmax(-1), (logits / temperature).log_softmax(-1)
    tokens = torch.multinomial(theirs.exp(), 1, generator=generator)
    sums = mismatch_sums(
        ours.gather(1, tokens).squeeze(1),
        theirs.gather(1, tokens).squeeze(1),
        torch.ones(4000),
        -(ours.exp() * ours).sum(-1),
    )
    found = take_mismatch({name: float(value) for name, value in sums.items()})
    assert found is not None
    assert found.fitted_temperature == pytest.approx(temperature, abs=0.04)
    said = temperature_text(found, 0)
    assert (said is None) == (temperature == 1.0)
    assert temperature_text(found, 1) is None


def test_differences_that_no_temperature_explains_name_none() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = -5 * torch.rand(1000, generator=generator)
    theirs = ours + 0.3 * torch.randn(1000, generator=generator)
    found = of(ours.tolist(), theirs.tolist(), [1.0] * 1000)
    assert found is not None
    assert temperature_text(found, 0) is None


ALARMING = Mismatch(tokens=10, mean_difference=0.3, kl=0.1, large_share=0.2, ratio=1.1)


def test_the_alarm_judges_only_batches_of_the_current_version() -> None:
    assert "0.3 nats on average over 10 tokens" in (alarm_text(ALARMING, 0, settings()) or "")
    assert alarm_text(ALARMING, 1, settings()) is None
    assert alarm_text(ALARMING, None, settings()) is None
    assert "judge neither this batch" in (unjudged_text(ALARMING, None, settings()) or "")
    assert unjudged_text(ALARMING, 1, settings()) is None
    assert unjudged_text(ALARMING, None, settings(mismatch_alarm=0.31)) is None
    assert alarm_text(None, 0, settings()) is None
    assert alarm_text(ALARMING, 0, settings(mismatch_alarm=None)) is None
    assert alarm_text(ALARMING, 0, settings(mismatch_alarm=0.31)) is None


def batch_of(
    model: Any, *, temperature: float = 1.0, shift: float = 0.0, without: int = 0, groups: int = 3
) -> bytes:
    """A batch whose log-probs are the model's own, off by `shift` nats; the last groups come without."""
    batch = json.loads(make_body(3, groups=groups))
    for number, group in enumerate(batch["batch"]):
        for tokens, mask, logprobs in zip(
            group["tokens"], group["masks"], group["inference_logprobs"], strict=True
        ):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([tokens])).logits[0].float() / temperature
            rows = logits.log_softmax(-1)
            for position, token in enumerate(tokens):
                if mask[position] != -100:
                    logprobs[position] = float(rows[position - 1, token]) + shift
        if number >= len(batch["batch"]) - without:
            group["inference_logprobs"] = None
    return json.dumps(batch).encode()


@pytest.fixture(scope="module")
def model(tiny_model_directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model_directory, dtype=torch.float32).eval()


@pytest.mark.parametrize("loss", ["weighted_sft", "policy_gradient", "ppo_clip"])
def test_a_faithful_sampler_agrees_on_every_loss(
    loss: str, model: Any, tiny_model_directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run(tiny_model_directory, tmp_path, [batch_of(model)], "--loss.name", loss, steps=1)
    (row,) = rows(tmp_path)
    assert row["mismatch_difference"] < 1e-5
    assert row["mismatch_kl"] < 1e-8
    assert row["mismatch_large_share"] == 0
    assert row["mismatch_tokens"] == row["trained_tokens"]
    assert row["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert "mismatch_alarms_total" not in row
    assert not [record for record in caplog.records if "differ from the trainer's" in record.getMessage()]


def test_groups_without_log_probs_are_left_out_and_do_not_dilute_the_numbers(
    model: Any, tiny_model_directory: Path, tmp_path: Path
) -> None:
    body = batch_of(model, shift=0.1, without=1)
    run(tiny_model_directory, tmp_path, [body], "--loss.name", "weighted_sft", steps=1)
    (row,) = rows(tmp_path)
    assert 0 < row["mismatch_tokens"] < row["trained_tokens"]
    assert row["mismatch_difference"] == pytest.approx(0.1, abs=1e-4)


def test_an_alarm_warns_once_a_batch_and_is_counted(
    model: Any, tiny_model_directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bodies = [batch_of(model, shift=-0.6), batch_of(model, shift=-0.6)]
    with caplog.at_level(logging.WARNING):
        run(tiny_model_directory, tmp_path, bodies, steps=2)
    first, second = rows(tmp_path)
    assert first["mismatch_difference"] == pytest.approx(0.6, abs=1e-3)
    assert first["mismatch_large_share"] == 1.0
    assert first["mismatch_alarms_total"] == 1
    assert second["staleness"] == 1  # the recording says that version 0 was served
    assert second["mismatch_alarms_total"] == 1
    alarms = [record.getMessage() for record in caplog.records if "mismatch_alarm" in record.getMessage()]
    assert len(alarms) == 1
    assert "though both should have the same weights" in alarms[0]


def test_with_stop_the_batch_is_kept_and_never_trained_on(
    model: Any, tiny_model_directory: Path, tmp_path: Path
) -> None:
    body = batch_of(model, shift=-0.6)
    with pytest.raises(MismatchTooLarge, match="was not trained on"):
        run(tiny_model_directory, tmp_path, [body], "--train.mismatch_action", "stop", steps=1)
    before = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    after = weights(tmp_path / "checkpoints" / "step-000000" / "model")
    assert all(torch.equal(value, before[name]) for name, value in after.items() if name in before)
    assert any(body in path.read_bytes() for path in (tmp_path / "set_aside").rglob("*") if path.is_file())


def test_log_probs_of_the_wrong_kind_show_on_the_first_batch(
    model: Any, tiny_model_directory: Path, tmp_path: Path
) -> None:
    """Sampled at 0.5: the loss divides by it, and a raw server does not."""
    for name, given in (("scaled", 0.5), ("raw", 1.0)):
        batch = json.loads(batch_of(model, temperature=given))
        for group in batch["batch"]:
            group["generation_params"] = {"temperature": 0.5}
        run(tiny_model_directory, tmp_path / name, [json.dumps(batch).encode()], steps=1)
    (scaled,) = rows(tmp_path / "scaled")
    (raw,) = rows(tmp_path / "raw")
    assert scaled["mismatch_difference"] < 1e-5
    assert raw["mismatch_difference"] > 100 * scaled["mismatch_difference"]


def test_an_unsaid_temperature_is_named_once_and_the_setting_mends_it(
    model: Any, tiny_model_directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The environment samples at 0.5, as its second group says; the others do not."""
    batch = json.loads(batch_of(model, temperature=0.5, groups=20))
    batch["batch"][1]["generation_params"] = {"temperature": 0.5}
    body = json.dumps(batch).encode()
    said = "times the temperature that is assumed"
    run(tiny_model_directory, tmp_path / "unsaid", [body, body], "--optimizer.learning_rate", "0", steps=2)
    assert caplog.text.count(said) == 1
    caplog.clear()
    for name, words in (
        ("all", ("--data.sampling_temperature", "0.5")),
        ("one", ("--data.sampling_temperature_of", '{"0": 0.5}')),
    ):
        run(tiny_model_directory, tmp_path / name, [body], *words, steps=1)
        (row,) = rows(tmp_path / name)
        assert row["mismatch_difference"] < 1e-5
    assert said not in caplog.text

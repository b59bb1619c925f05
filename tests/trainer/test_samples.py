"""From groups to samples: alignment, temperature, and what the model cannot take."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from schemas import BatchReply, ScoredGroup
from trainer.config import DataSettings, LossSettings
from trainer.samples.advantages import AdvantageNormalizer
from trainer.samples.prepare import prepare_batch
from trainer.samples.sample import sampling_temperature
from trainer.samples.validation import ModelLimits, set_aside_reason

LIMITS = ModelLimits(vocabulary_size=100, max_sequence_length=16)


def group(**changes: Any) -> ScoredGroup:
    fields: dict[str, Any] = {
        "tokens": [[1, 2, 3, 4], [1, 2, 5]],
        "masks": [[-100, -100, 3, 4], [-100, -100, 5]],
        "scores": [1.0, 0.0],
        "inference_logprobs": [[1.0, 1.0, -0.5, -0.25], [1.0, 1.0, -2.0]],
        "env_id": 3,
    }
    return ScoredGroup.model_validate(fields | changes)


def test_every_column_speaks_of_its_own_token() -> None:
    first, second = prepare(group()).samples
    assert first.tokens.tolist() == [1, 2, 3, 4]
    assert first.loss_mask.tolist() == [0, 0, 1, 1]
    assert first.advantages.tolist() == [0, 0, 0.5, 0.5]
    assert first.inference_logprobs is not None
    assert first.inference_logprobs.tolist() == [1.0, 1.0, -0.5, -0.25]
    assert second.trained_tokens == 1


def test_the_first_token_is_never_trained_because_nothing_predicts_it() -> None:
    unmasked = group(masks=[[1, 2, 3, 4], [1, 2, 5]], inference_logprobs=None)
    first, _ = prepare(unmasked, loss={"name": "weighted_sft"}).samples
    assert first.loss_mask.tolist() == [0, 1, 1, 1]
    assert first.advantages[0] == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 1.0),
        ({"group_overrides": {"temperature": 0.3}}, 0.3),
        ({"group_overrides": {"temperature": 0.3}, "generation_params": {"temperature": 0.5}}, 0.5),
        (
            {
                "group_overrides": {"temperature": 0.3},
                "generation_params": {"temperature": 0.5},
                "overrides": [{"temperature": 0.7}, {}],
            },
            0.7,
        ),
        ({"generation_params": {"temperature": 0}}, 1.0),
        ({"generation_params": {"temperature": 0.5}, "overrides": [{"temperature": 0}, {}]}, 1.0),
        ({"generation_params": {"temperature": "hot"}}, 1.0),
        ({"generation_params": {"temperature": True}}, 1.0),
    ],
)
def test_the_nearest_word_on_temperature_wins(changes: dict[str, Any], expected: float) -> None:
    assert sampling_temperature(group(**changes), 0) == expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"tokens": [[1, 2, 3, 4], [1, 2, 100]], "masks": [[-100, -100, 3, 4], [-100, -100, 100]]},
            "token id 100",
        ),
        (
            {
                "tokens": [[1] * 17, [1]],
                "masks": [[-100] * 17, [-100]],
                "inference_logprobs": [[1.0] * 17, [1.0]],
            },
            "17 tokens, more than the 16",
        ),
        ({"inference_logprobs": None}, "no inference_logprobs, which loss.name ppo_clip needs"),
        ({}, "no ref_logprobs"),
    ],
)
def test_what_model_or_loss_cannot_take_is_named(changes: dict[str, Any], reason: str) -> None:
    found = set_aside_reason(
        group(**changes), LIMITS, user_of_inference_logprobs="loss.name ppo_clip", needs_ref_logprobs=True
    )
    assert found is not None
    assert reason in found


def prepare(
    *groups: ScoredGroup, loss: dict[str, Any] | None = None, data: dict[str, Any] | None = None
) -> Any:
    reply = BatchReply.model_validate({"batch": [each.model_dump() for each in groups]})
    settings = DataSettings(**({"advantage_estimator": "group_center"} | (data or {})))
    return prepare_batch(
        reply,
        limits=LIMITS,
        data=settings,
        loss=LossSettings(**(loss or {})),
        normalizer=AdvantageNormalizer(settings.advantage_normalization),
    )


def test_denominators_of_each_reduction() -> None:
    assert prepare(group()).denominators == [3.0, 3.0]
    assert prepare(group(), loss={"reduction": "sequence"}).denominators == [4.0, 2.0]
    assert prepare(group(), loss={"reduction": "constant", "constant_length": 10}).denominators == [
        20.0,
        20.0,
    ]


def test_groups_without_spread_are_left_out_and_still_count() -> None:
    prepared = prepare(group(), group(scores=[1.0, 1.0]))
    assert (len(prepared.samples), prepared.trained_tokens, prepared.denominators[0]) == (2, 6.0, 6.0)
    assert prepared.groups_without_spread == 1


def test_a_kl_term_needs_groups_without_spread_too() -> None:
    flat = group(scores=[1.0, 1.0], ref_logprobs=[[1.0, 1.0, -0.5, -0.25], [1.0, 1.0, -2.0]])
    assert len(prepare(flat, loss={"kl_coefficient": 0.1}).samples) == 2


def test_an_override_sets_an_advantage_to_zero_after_the_group_is_normalized() -> None:
    prepared = prepare(group(overrides=[{"set_advantage_to_zero": True}, {}]))
    assert [sample.score for sample in prepared.samples] == [0.0]
    assert prepared.samples[0].advantages.tolist() == [0, 0, -0.5]
    assert prepared.trained_tokens == 3.0


def test_a_group_of_one_has_an_advantage_only_where_it_is_asked_for() -> None:
    one = {"tokens": [[1, 2, 3]], "masks": [[-100, 2, 3]], "scores": [0.75], "inference_logprobs": None}
    why = prepare(group(**one), loss={"name": "weighted_sft"}).empty_reason
    assert "one sequence" in why
    assert "data.advantage_estimator raw" in why
    for asking in ({"overrides": [{"sft": True}]}, {"group_overrides": {"sft": True}}):
        (sample,) = prepare(group(**one, **asking), loss={"name": "weighted_sft"}).samples
        assert sample.advantages.tolist() == [0, 0.75, 0.75]


def test_batch_normalization_divides_by_the_standard_deviation_over_trained_tokens() -> None:
    prepared = prepare(group(), data={"advantage_normalization": "batch"})
    expected = torch.tensor([0.5, 0.5, -0.5]).std(correction=0)
    assert prepared.samples[0].advantages[2] == pytest.approx(0.5 / float(expected))

"""Preparing a step against a slow, obvious reference: one sequence and one token at a time."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import BatchReply
from tests.schemas.groups import groups
from trainer.config import DataSettings, LossSettings
from trainer.extensions import GroupScores
from trainer.samples.advantages import AdvantageNormalizer
from trainer.samples.prepare import PreparedBatch, prepare_batch
from trainer.samples.validation import ModelLimits

LIMITS = ModelLimits(vocabulary_size=200_001, max_sequence_length=64)

temperatures = st.sampled_from([None, 0, 0.5, 2, True, "hot"])


@st.composite
def batches(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Valid groups with every optional field there or not, binary masks, and all kinds of wishes."""
    batch = draw(st.lists(groups(), min_size=1, max_size=4))
    for group in batch:
        group["scores"] = draw(
            st.lists(st.floats(-3, 3, width=32), min_size=len(group["tokens"]), max_size=len(group["tokens"]))
        )
        if group.get("advantages"):
            group["advantages"] = [
                draw(st.lists(st.floats(-2, 2, width=32), min_size=len(row), max_size=len(row)))
                for row in group["tokens"]
            ]
        if group.get("overrides"):
            group["overrides"] = [
                {"set_advantage_to_zero": draw(st.booleans()), "temperature": draw(temperatures)}
                for _ in group["tokens"]
            ]
        if group.get("generation_params"):
            group["generation_params"] = {"temperature": draw(temperatures)}
        if group.get("group_overrides"):
            group["group_overrides"] = {"temperature": draw(temperatures)}
        if draw(st.booleans()) and all(token > 1 for row in group["tokens"] for token in row):
            group["masks"] = [[int(entry != -100) for entry in row] for row in group["masks"]]
    return batch


def usable_temperature(*sources: Any) -> float:
    for source in sources:
        value = (source or {}).get("temperature")
        if value is not None:  # the nearest word counts, greedy sampling included
            return float(value) if type(value) in (int, float) and value > 0 else 1.0
    return 1.0


def reference(batch: list[dict[str, Any]], data: DataSettings) -> list[dict[str, Any]]:
    """Every sequence of the batch, in Python lists."""
    sequences = []
    for group_index, group in enumerate(batch):
        estimated = data.bound_estimator(group["scores"])
        for i, tokens in enumerate(group["tokens"]):
            override = (group.get("overrides") or [None] * len(group["tokens"]))[i]
            # A mask of 0 for token 0 is the token's id: trained.
            is_binary = any(
                entry not in (-100, token)
                for mask, row in zip(group["masks"], group["tokens"], strict=True)
                for entry, token in zip(mask, row, strict=True)
            )
            trained = [(e == 1 if is_binary else e != -100) for e in group["masks"][i]]
            trained[0] = False
            own = group["advantages"][i] if group.get("advantages") else [estimated[i]] * len(tokens)
            zero = bool(override and override.get("set_advantage_to_zero"))
            sequences.append(
                {
                    "tokens": tokens,
                    "loss_mask": [float(on) for on in trained],
                    "advantages": [a if on and not zero else 0.0 for a, on in zip(own, trained, strict=True)],
                    "inference_logprobs": group["inference_logprobs"][i]
                    if group.get("inference_logprobs")
                    else None,
                    "ref_logprobs": group["ref_logprobs"][i] if group.get("ref_logprobs") else None,
                    "temperature": usable_temperature(
                        override, group.get("generation_params"), group.get("group_overrides")
                    ),
                    "score": group["scores"][i],
                    "env_id": group.get("env_id"),
                    "group_index": group_index,
                }
            )
    values = [a for s in sequences for a, on in zip(s["advantages"], s["loss_mask"], strict=True) if on]
    if data.advantage_normalization == "batch" and values:
        mean = math.fsum(values) / len(values)
        spread = math.sqrt(math.fsum((a - mean) ** 2 for a in values) / len(values))
        magnitude = math.sqrt(math.fsum(a * a for a in values) / len(values))
        if spread > 1e-6 * magnitude:
            for s in sequences:
                s["advantages"] = [a / spread for a in s["advantages"]]
    return sequences


def prepare(batch: list[dict[str, Any]], data: DataSettings, loss: LossSettings) -> PreparedBatch:
    return prepare_batch(
        BatchReply.model_validate_json(json.dumps({"batch": batch})),
        limits=LIMITS,
        data=data,
        loss=loss,
        normalizer=AdvantageNormalizer(data.advantage_normalization),
    )


def as_float32(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


@given(
    batches(),
    st.sampled_from(["group_norm", "group_center", "leave_one_out", "raw"]),
    st.sampled_from(["none", "batch"]),
    st.sampled_from(["token", "sequence", "constant"]),
)
@settings(deadline=None)
def test_a_prepared_batch_is_what_one_token_at_a_time_gives(
    batch: list[dict[str, Any]], estimator: Any, normalization: Any, reduction: Any
) -> None:
    data = DataSettings(advantage_estimator=estimator, advantage_normalization=normalization)
    constant = {"constant_length": 10} if reduction == "constant" else {}
    loss = LossSettings(name="weighted_sft", reduction=reduction, **constant)
    prepared = prepare(batch, data, loss)
    every = reference(batch, data)
    counts = [sum(sequence["loss_mask"]) for sequence in every]
    trainable = sum(count > 0 for count in counts)
    assert prepared.set_aside == []
    assert prepared.trained_tokens == sum(counts)
    assert prepared.scores == [sequence["score"] for sequence in every]
    torch.testing.assert_close(
        torch.tensor(prepared.advantages, dtype=torch.float64),
        torch.tensor(
            [math.fsum(s["advantages"]) / n for s, n in zip(every, counts, strict=True) if n],
            dtype=torch.float64,
        ),
        rtol=1e-5,
        atol=1e-6,
    )
    expected = [
        (
            sequence,
            {"token": sum(counts), "sequence": trainable * count, "constant": trainable * 10}[reduction],
        )
        for sequence, count in zip(every, counts, strict=True)
        if count and as_float32(sequence["advantages"]).any()
    ]
    assert prepared.denominators == [denominator for _, denominator in expected]
    assert len(prepared.samples) == len(expected)
    for sample, (sequence, _) in zip(prepared.samples, expected, strict=True):
        assert sample.tokens.dtype == torch.int64
        assert sample.tokens.tolist() == sequence["tokens"]
        assert sample.loss_mask.tolist() == sequence["loss_mask"]
        torch.testing.assert_close(
            sample.advantages, as_float32(sequence["advantages"]), rtol=1e-5, atol=1e-7
        )
        for name in ("inference_logprobs", "ref_logprobs"):
            ours = getattr(sample, name)
            assert (ours is None) == (sequence[name] is None)
            assert ours is None or torch.equal(ours, as_float32(sequence[name]))
        for name in ("temperature", "score", "env_id", "group_index"):
            assert getattr(sample, name) == sequence[name]


def test_a_batch_without_a_usable_group_is_prepared_empty() -> None:
    foreign = {"tokens": [[1, 300_000]], "masks": [[-100, 300_000]], "scores": [1.0]}
    prepared = prepare([foreign], DataSettings(), LossSettings(name="weighted_sft"))
    assert (prepared.samples, prepared.scores, prepared.trained_tokens) == ([], [], 0)
    assert len(prepared.set_aside) == 1


def test_the_state_of_the_normalizer_after_each_batch_travels_with_it() -> None:
    data = DataSettings(advantage_normalization="global", advantage_estimator="raw")
    normalizer = AdvantageNormalizer("global")
    states = []
    for score in (1.0, 2.0):
        group = {"tokens": [[1, 2]], "masks": [[-100, 2]], "scores": [score]}
        reply = BatchReply.model_validate({"batch": [group]})
        loss = LossSettings(name="weighted_sft")
        states.append(
            prepare_batch(reply, limits=LIMITS, data=data, loss=loss, normalizer=normalizer).normalizer
        )
    assert [state["count"] for state in states] == [1.0, 2.0]
    assert states[1]["mean"] == pytest.approx(1.5)


def test_advantages_are_clipped_after_they_were_normalized() -> None:
    group = {"tokens": [[1, 2]] * 3, "masks": [[-100, 2]] * 3, "scores": [-9.0, 1.0, 9.0]}
    data = DataSettings(advantage_estimator="raw", advantage_clip=(-2.0, 5.0))
    prepared = prepare([group], data, LossSettings(name="weighted_sft"))
    assert prepared.advantages == [-2.0, 1.0, 5.0]


@pytest.mark.parametrize("estimator", ["reinforce_plus_plus_baseline", "gpg", "batch_std"])
def test_what_is_taken_over_the_batch_is_taken_over_the_groups_that_it_applies_to(estimator: str) -> None:
    """Not over what is set aside, nor over token-level advantages; a zero is set afterwards."""
    with_scores: list[dict[str, Any]] = [
        {"tokens": [[1, 2, 3, 4], [1, 2]], "masks": [[-100, 2, 3, 4], [-100, 2]], "scores": [1.0, 0.0]},
        {"tokens": [[5, 6], [5, 7]], "masks": [[5, 6], [-100, 7]], "scores": [0.0, 4.0]},
    ]
    with_scores[1]["overrides"] = [{"set_advantage_to_zero": True}, {}]
    others = [
        {"tokens": [[1, 300_000]] * 2, "masks": [[-100, 300_000]] * 2, "scores": [50.0, -9.0]},
        {"tokens": [[1, 2]], "masks": [[-100, 2]], "scores": [70.0], "advantages": [[0.0, 0.25]]},
        {"tokens": [[1, 2]] * 2, "masks": [[-100, 2]] * 2, "scores": [0.0, 1e30]},
    ]
    data = DataSettings(advantage_estimator=estimator)
    expected = data.bound_estimator.of_batch(
        [
            GroupScores(scores=[1.0, 0.0], trained_tokens=[3, 1]),
            GroupScores(scores=[0.0, 4.0], trained_tokens=[1, 1]),  # nothing predicts a first token
        ]
    )
    prepared = prepare(with_scores + others, data, LossSettings(name="weighted_sft"))
    assert len(prepared.set_aside) == 2
    assert prepared.advantages == pytest.approx([*expected[0], 0.0, expected[1][1], 0.25], rel=1e-6)


def test_a_group_that_the_estimator_cannot_take_is_set_aside_with_its_reason() -> None:
    groups = [
        {"tokens": [[1, 2]] * 2, "masks": [[-100, 2]] * 2, "scores": scores}
        for scores in ([-1.0, 0.0], [0.0, 1.0])
    ]
    prepared = prepare(
        groups, DataSettings(advantage_estimator="maxrl", advantage_limit=None), LossSettings()
    )
    assert [each.reason for each in prepared.set_aside] == [
        (
            "the mean of the group's scores is -0.5, and maxrl divides by it: let the environment score "
            "failures 0 and successes 1, or set another data.advantage_estimator"
        )
    ]
    assert prepared.advantages == [-1.0, 1.0]


def test_the_kl_to_the_reference_comes_off_the_scores_before_they_are_advantages() -> None:
    group = {
        "tokens": [[5, 6, 7], [5, 8]],
        "masks": [[-100, 6, 7], [-100, 8]],
        "scores": [1.0, 0.0],
        "inference_logprobs": [[1.0, -1.0, -2.0], [1.0, -0.5]],
        "ref_logprobs": [[1.0, -1.5, -4.0], [1.0, -0.25]],
    }
    data = DataSettings(advantage_estimator="raw", reward_kl_coefficient=0.1)
    batch = prepare([group], data, LossSettings())
    advantages = [sample.advantages.tolist() for sample in batch.samples]
    assert advantages[0] == pytest.approx([0, 0.75, 0.75])  # 1 - 0.1 * (0.5 + 2)
    assert advantages[1] == pytest.approx([0, 0.025])  # 0 - 0.1 * -0.25
    assert batch.scores == [1.0, 0.0]

    lacking = prepare([group | {"ref_logprobs": None}], data, LossSettings())
    assert lacking.set_aside[0].reason.startswith("no ref_logprobs, which data.reward_kl_coefficient needs")


def test_scores_are_judged_after_the_reference_was_taken_off_them() -> None:
    """By the estimator, which may not be able to take them, and by data.advantage_limit."""
    group: dict[str, Any] = {"tokens": [[1, 2]] * 2, "masks": [[-100, 2]] * 2, "scores": [1.0, 0.0]}
    group |= {"ref_logprobs": [[1.0, -1.0]] * 2}
    far = {"inference_logprobs": [[1.0, -0.5], [1.0, -1e30]]}
    near = {"inference_logprobs": [[1.0, -0.5]] * 2}
    penalty = {"reward_kl_coefficient": 1.0}
    for estimator, samples, reason in (
        ("maxrl", near, "the mean of the group's scores is 0, and maxrl divides by it"),
        ("group_center", far, "the advantage of sequence 0 is -5e+29, beyond 1e+06"),
    ):
        data = DataSettings(advantage_estimator=estimator, **penalty)
        prepared = prepare([group | samples], data, LossSettings(name="weighted_sft"))
        assert [each.reason[: len(reason)] for each in prepared.set_aside] == [reason]

"""Distillation: what a teacher's fields must be, what they add to advantages, the divergence as a loss."""

from __future__ import annotations

import json
import logging
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from schemas import BatchReply
from tests.trainer.batches import make_group
from tests.trainer.models import random_tree_samples, tiny_model
from tests.trainer.runs import rows, run
from trainer.config import DataSettings, DistillationSettings, LossSettings
from trainer.losses import teacher_divergence
from trainer.model.lm_head.select import choose_head
from trainer.model.token_logprobs import token_logprobs
from trainer.packing import Packing, pack
from trainer.samples.advantages import AdvantageNormalizer
from trainer.samples.prepare import PreparedBatch, prepare_batch
from trainer.samples.teacher import TeacherRows
from trainer.samples.validation import ModelLimits

VOCABULARY = 259


def with_teacher(group: dict[str, Any], *, seed: int = 0, fewest: int = 0, most: int = 4) -> dict[str, Any]:
    """Candidates at each trained token: the token itself, and `fewest` to `most` others."""
    generator = random.Random(seed)
    ids: list[list[list[int]]] = []
    for tokens, masks in zip(group["tokens"], group["masks"], strict=True):
        ids.append(
            [
                []
                if mask == -100
                else [
                    token,
                    *generator.sample(
                        [v for v in range(VOCABULARY) if v != token], generator.randint(fewest, most)
                    ),
                ]
                for token, mask in zip(tokens, masks, strict=True)
            ]
        )
    logprobs = [[[-generator.uniform(2, 5) for _ in place] for place in row] for row in ids]
    return group | {"distill_token_ids": ids, "distill_logprobs": logprobs}


def prepare(group: dict[str, Any], data: DataSettings | None = None, **settings: Any) -> PreparedBatch:
    body = json.dumps({"batch": [group]}).encode()
    return prepare_batch(
        BatchReply.model_validate_json(body),
        limits=ModelLimits(vocabulary_size=VOCABULARY, max_sequence_length=512),
        data=data or DataSettings(),
        loss=LossSettings(),
        normalizer=AdvantageNormalizer("none"),
        distillation=DistillationSettings(**settings),
    )


def changed(group: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A copy whose first sequence has `value` at its last token."""
    copied = json.loads(json.dumps(group))
    copied[name][0][-1] = value
    return copied


GROUP = make_group(random.Random(1))
TAUGHT = with_teacher(GROUP)
PAIRS = with_teacher(GROUP, fewest=1, most=1)
LAST = len(GROUP["tokens"][0]) - 1
TOKEN = GROUP["tokens"][0][-1]


@pytest.mark.parametrize(
    ("mode", "group", "reason"),
    [
        ("forward_kl", GROUP, "no distill_token_ids, which distillation.mode forward_kl needs"),
        ("sampled_token", TAUGHT | {"inference_logprobs": None}, "no inference_logprobs"),
        (
            "reverse_kl",
            changed(changed(TAUGHT, "distill_token_ids", []), "distill_logprobs", []),
            f"distill_token_ids[0][{LAST}] is empty at a trained token",
        ),
        (
            "forward_kl",
            changed(changed(TAUGHT, "distill_token_ids", [VOCABULARY]), "distill_logprobs", [-1.0]),
            f"distill_token_ids[0][{LAST}] names a token outside the model's vocabulary of {VOCABULARY}",
        ),
        (
            "forward_kl",
            changed(changed(TAUGHT, "distill_token_ids", [3, 5, 3]), "distill_logprobs", [-1.0] * 3),
            f"distill_token_ids[0][{LAST}] names a token twice",
        ),
        (
            "forward_kl",
            changed(changed(TAUGHT, "distill_token_ids", [3]), "distill_logprobs", [0.5]),
            f"distill_token_ids[0][{LAST}] has a log-prob above 0 beside it",
        ),
        (
            "reverse_kl",
            changed(changed(TAUGHT, "distill_token_ids", [3, 5]), "distill_logprobs", [-0.1, -0.2]),
            f"distill_token_ids[0][{LAST}] has probabilities beside it that add up to more than 1",
        ),
        (
            "sampled_token",
            changed(changed(TAUGHT, "distill_token_ids", [(TOKEN + 1) % 200]), "distill_logprobs", [-1.0]),
            f"distill_token_ids[0][{LAST}] lacks the sampled token",
        ),
        (
            "reverse_kl",
            changed(changed(PAIRS, "distill_token_ids", [TOKEN]), "distill_logprobs", [-0.1]),
            f"distill_token_ids[0][{LAST}] has one candidate at a trained token; distillation.mode reverse",
        ),
    ],
)
def test_a_group_whose_fields_cannot_be_used_is_set_aside(
    mode: str, group: dict[str, Any], reason: str
) -> None:
    batch = prepare(group, mode=mode)
    assert batch.samples == []
    (found,) = batch.set_aside
    assert reason in found.reason


def test_two_candidates_are_enough_for_the_reverse_divergence_and_one_for_the_others() -> None:
    single = with_teacher(GROUP, most=0)
    assert prepare(PAIRS, mode="reverse_kl").set_aside == []
    assert prepare(single, mode="forward_kl").set_aside == []
    assert prepare(single, mode="sampled_token").set_aside == []
    assert len(prepare(single, mode="reverse_kl").set_aside) == 1


def test_of_one_candidate_the_forward_divergence_is_its_negative_log_prob() -> None:
    policy = torch.tensor([[-1.75]], requires_grad=True)
    value = teacher_divergence(policy, torch.tensor([[-0.3]]), "forward_kl")
    value.sum().backward()
    assert value.item() == pytest.approx(1.75)
    assert policy.grad is not None
    assert policy.grad.item() == pytest.approx(-1.0)


def shifted(group: dict[str, Any]) -> dict[str, Any]:
    """Candidates at each token, all of them those of the token before."""
    everywhere = with_teacher(group | {"masks": group["tokens"]}, fewest=2)
    fields = ("distill_token_ids", "distill_logprobs")
    moved = {name: [[[], *row[:-1]] for row in everywhere[name]] for name in fields}
    return everywhere | moved | {"masks": group["masks"]}


@pytest.mark.parametrize("mode", ["forward_kl", "reverse_kl"])
def test_fields_of_other_positions_are_warned_of_once_with_the_share(
    mode: str, tiny_model_directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    aligned, wrong = PAIRS | {"env_id": 3}, shifted(GROUP) | {"env_id": 7}
    assert prepare(aligned, mode=mode).without_sampled_token == {3: 0.0}
    (share,) = prepare(wrong, mode=mode).without_sampled_token.values()
    assert share > 0.9
    body = json.dumps({"batch": [aligned, wrong]}).encode()
    with caplog.at_level(logging.WARNING):
        run(tiny_model_directory, tmp_path, [body, body], "--distillation.mode", mode, steps=2)
    (warning,) = (text for text in caplog.messages if "sampled token" in text)
    assert f"environment 7: the teacher's candidates lack the sampled token at {100 * share:.0f}%" in warning


def test_without_a_mode_nothing_is_asked_of_the_fields() -> None:
    batch = prepare(changed(changed(TAUGHT, "distill_token_ids", [3, 3]), "distill_logprobs", [-1.0] * 2))
    assert (len(batch.samples), batch.set_aside) == (4, [])
    assert all(sample.teacher is None for sample in batch.samples)


def test_the_sampled_tokens_advantage_is_the_teachers_log_prob_over_the_samplers() -> None:
    plain = prepare(TAUGHT)
    mixed = prepare(TAUGHT, mode="sampled_token", coefficient=0.25, reward_coefficient=0.5)
    for index, (before, after) in enumerate(zip(plain.samples, mixed.samples, strict=True)):
        for place, mask in enumerate(TAUGHT["masks"][index]):
            expected = 0.0
            if mask != -100:
                teacher = TAUGHT["distill_logprobs"][index][place][0]
                sampler = TAUGHT["inference_logprobs"][index][place]
                expected = 0.5 * float(before.advantages[place]) + 0.25 * (teacher - sampler)
            assert float(after.advantages[place]) == pytest.approx(expected, abs=1e-6)


def test_the_wishes_of_an_environment_hold_for_the_teacher_too() -> None:
    wishes = [{"set_advantage_to_zero": True}, {"sft": True}, {}, {}]
    plain = prepare(TAUGHT | {"overrides": wishes})
    mixed = prepare(TAUGHT | {"overrides": wishes}, mode="sampled_token")
    assert len(plain.samples) == len(mixed.samples) == 3  # one is set to zero, and has no gradient
    assert torch.equal(mixed.samples[0].advantages, plain.samples[0].advantages)
    assert not torch.equal(mixed.samples[1].advantages, plain.samples[1].advantages)


def test_one_token_cannot_decide_the_step_and_clipping_bounds_the_sum() -> None:
    absurd = changed(TAUGHT, "inference_logprobs", -1e30)
    alone = {"mode": "sampled_token", "reward_coefficient": 0.0}
    assert float(prepare(absurd, **alone).samples[0].advantages[-1]) == 20.0
    clipped = prepare(absurd, data=DataSettings(advantage_clip=(-0.5, 3.0)), **alone)
    found = torch.cat([sample.advantages for sample in clipped.samples])
    assert -0.5 <= float(found.min()) < float(found.max()) == 3.0


def test_the_sampled_tokens_distance_is_in_the_metrics(tiny_model_directory: Path, tmp_path: Path) -> None:
    body = json.dumps({"batch": [TAUGHT]}).encode()
    run(tiny_model_directory, tmp_path, [body], "--loss.preset", "opd", steps=1)
    differences = [
        sampler - teacher[0]
        for masks, samplers, teachers in zip(
            TAUGHT["masks"], TAUGHT["inference_logprobs"], TAUGHT["distill_logprobs"], strict=True
        )
        for mask, sampler, teacher in zip(masks, samplers, teachers, strict=True)
        if mask != -100
    ]
    (row,) = rows(tmp_path)
    assert row["kl_teacher"] == pytest.approx(sum(differences) / len(differences), rel=1e-5)


def plain_divergence(policy: list[float], teacher: list[float], direction: str) -> float:
    """Of one token, in plain Python."""
    p = [math.exp(value) for value in teacher]
    p = [value / sum(p) for value in p]
    q = [math.exp(value) for value in policy]
    if direction == "forward_kl":
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    s = [value / sum(q) for value in q]
    return sum(a * math.log(a / b) for a, b in zip(s, p, strict=True))


@pytest.mark.parametrize("direction", ["forward_kl", "reverse_kl"])
def test_the_divergence_is_that_of_plain_python(direction: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    counts = [0, 1, 2, 5, 5, 3]
    policy = logits.log_softmax(-1)[:, :5].clone().requires_grad_()
    teacher = torch.full((6, 5), -torch.inf, dtype=torch.float64)
    for row, count in enumerate(counts):
        teacher[row, :count] = -torch.rand(count, generator=generator, dtype=torch.float64) * 4
    found = teacher_divergence(policy, teacher, direction).detach()
    for row, count in enumerate(counts):
        expected = 0.0
        if count:
            expected = plain_divergence(
                policy[row, :count].tolist(), teacher[row, :count].tolist(), direction
            )
        assert found[row].item() == pytest.approx(expected, abs=1e-12)
        assert expected >= 0

    def total(values: Tensor) -> Tensor:
        return teacher_divergence(values, teacher, direction)

    assert torch.autograd.gradcheck(total, (policy,))


@pytest.mark.parametrize("packing", ["prefix_tree", "padded"])
def test_candidates_are_scored_as_the_models_own_logits_score_them(packing: Packing) -> None:
    model = tiny_model("llama").double()
    generator = random.Random(0)
    samples = []
    for sample in random_tree_samples(3):
        width, length = generator.randint(1, 4), len(sample.tokens)
        ids = torch.tensor([generator.sample(range(30), width) for _ in range(length)])
        rows_of = TeacherRows(token_ids=ids, logprobs=torch.full((length, width), -1.0))
        samples.append(type(sample)(**(vars(sample) | {"teacher": rows_of})))
    samples = [sample for sample in samples if sample.trained_tokens]
    (batch,) = pack(samples, [1.0] * len(samples), packing=packing, tokens_per_micro_batch=100_000)
    head = choose_head(model, "tiled")
    tiled, whole = (token_logprobs(model, batch, use_temperature=True, head=each) for each in (head, None))
    assert tiled.candidates is not None
    assert whole.candidates is not None
    torch.testing.assert_close(tiled.candidates, whole.candidates)
    alone = token_logprobs(
        model,
        type(batch)(**(vars(batch) | {"teacher_token_ids": None, "teacher_logprobs": None})),
        use_temperature=True,
        head=head,
    )
    assert alone.candidates is None
    torch.testing.assert_close(alone.logprobs, tiled.logprobs)


@pytest.mark.parametrize("mode", ["forward_kl", "reverse_kl"])
def test_a_step_has_the_loss_that_is_written_by_hand(
    mode: str, tiny_model_directory: Path, tmp_path: Path
) -> None:
    fewest = 1 if mode == "reverse_kl" else 0
    groups = [with_teacher(make_group(random.Random(seed)), seed=seed, fewest=fewest) for seed in range(3)]
    body = json.dumps({"batch": groups}).encode()
    options = (
        "--distillation.mode",
        mode,
        "--distillation.coefficient",
        "0.5",
        "--loss.name",
        "weighted_sft",
    )
    options += ("--distillation.reward_coefficient", "0")
    for name, budget in (("one", "4096"), ("many", "40")):
        run(
            *(
                tiny_model_directory,
                tmp_path / name,
                [body],
                *options,
                "--data.tokens_per_micro_batch",
                budget,
            ),
            steps=1,
        )
    model = AutoModelForCausalLM.from_pretrained(tiny_model_directory)
    expected, count = 0.0, 0
    for group in groups:
        for tokens, ids, teacher in zip(
            group["tokens"], group["distill_token_ids"], group["distill_logprobs"], strict=True
        ):
            with torch.no_grad():
                logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            for place, candidates in enumerate(ids):
                if candidates:
                    policy = [float(logprobs[place - 1, token]) for token in candidates]
                    expected += plain_divergence(policy, teacher[place], mode)
                    count += 1
    (one,), (many,) = rows(tmp_path / "one"), rows(tmp_path / "many")
    assert one["kl_teacher"] == pytest.approx(expected / count, rel=1e-5)
    assert one["loss"] == pytest.approx(0.5 * expected / count, rel=1e-5)
    assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)

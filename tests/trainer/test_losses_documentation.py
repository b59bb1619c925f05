"""The worked example in docs/losses.md, recomputed; and that every objective has a row in its page."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from pydantic import BaseModel
from torch import Tensor

from schemas import ScoredGroup
from trainer.config import LossSettings
from trainer.extensions import BUILT_IN_LOSSES, Options
from trainer.losses import (
    CorrectionOptions,
    KlOptions,
    LossInputs,
    policy_gradient,
    ppo_clip,
    resolve_loss,
    weighted_sft,
)
from trainer.model.weighted_sft_call import compute_advantage_weighted_sft_loss
from trainer.samples.advantages import group_center, token_advantages

PAGE = (Path(__file__).parents[2] / "docs" / "losses.md").read_text(encoding="utf-8")
VOCABULARY = 50257


@pytest.fixture(scope="module")
def example() -> Any:
    (block,) = re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)
    return json.loads(block)


@pytest.fixture(scope="module")
def group(example: Any) -> ScoredGroup:
    fields = {name: value for name, value in example.items() if name != "trainer_logprobs"}
    return ScoredGroup.model_validate(fields)


@pytest.fixture(scope="module")
def inputs(example: Any, group: ScoredGroup) -> LossInputs:
    return LossInputs(
        logprobs=torch.tensor(example["trainer_logprobs"]),
        advantages=token_advantages([group], estimator=group_center.bind(Options())).reshape(
            len(group.tokens), -1
        ),
        loss_mask=torch.tensor(group.masks) != -100,
        inference_logprobs=torch.tensor(example["inference_logprobs"]),
    )


def documented_loss(row_starts_with: str) -> float:
    """The last cell of a row of the page's table of results."""
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| {row_starts_with}"))
    return float(row.strip("| ").split("|")[-1])


def model_with_these_logprobs(input_ids: Tensor, logprobs: Tensor) -> Any:
    """A model that gives each token the log-prob listed for it, and shares the rest among all others."""
    probability = logprobs[:, 1:].clamp(max=-0.01).double().exp()  # [B, T - 1]
    others = ((1 - probability) / (VOCABULARY - 1)).log()
    logits = others[..., None].repeat(1, 1, VOCABULARY)
    logits.scatter_(2, input_ids[:, 1:, None], probability.log()[..., None])
    logits = torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1)
    return lambda *, input_ids: SimpleNamespace(logits=logits)


@pytest.mark.parametrize(
    ("loss", "row"),
    [(weighted_sft, "`weighted_sft`"), (policy_gradient, "`policy_gradient` |"), (ppo_clip, "`ppo_clip` |")],
)
def test_each_loss_has_its_documented_value(loss: Any, row: str, inputs: LossInputs) -> None:
    assert loss(inputs)[0].item() == pytest.approx(documented_loss(row), abs=5e-5)


def test_the_documented_values_are_those_of_arithmetic_by_hand() -> None:
    by_hand = {
        "`weighted_sft`": (0.5 * (0.9 + 0.2 + 0.1) - 0.5 * (2.0 + 0.3 + 0.1)) / 6,
        'the function with `alignment="prediction"` and': (0.5 * (0.2 + 0.1) - 0.5 * (0.3 + 0.1)) / 4,
        "`policy_gradient` |": (0.5 * (math.exp(0.3) * 0.9 + 0.3) - 0.5 * (math.exp(-0.3) * 2.0 + 0.4)) / 6,
        "`ppo_clip` |": (-0.5 * (1.2 + 1 + 1) + 0.5 * (0.8 + 1 + 1)) / 6,
    }
    assert {row: documented_loss(row) for row in by_hand} == pytest.approx(by_hand, abs=5e-5)


@pytest.mark.parametrize(
    ("alignment", "columns_to_the_left", "row"),
    [
        ("token", 0, "`weighted_sft`, and the function"),
        ("prediction", 1, 'the function with `alignment="prediction"`, arrays moved'),
        ("prediction", 0, 'the function with `alignment="prediction"` and the arrays as they are'),
    ],
)
def test_the_function_has_its_documented_value_under_each_alignment(
    alignment: Any, columns_to_the_left: int, row: str, inputs: LossInputs, group: ScoredGroup
) -> None:
    input_ids = torch.tensor(group.tokens)
    loss = compute_advantage_weighted_sft_loss(
        model_with_these_logprobs(input_ids, inputs.logprobs),
        input_ids,
        inputs.advantages.roll(-columns_to_the_left, dims=1),
        inputs.loss_mask.roll(-columns_to_the_left, dims=1),
        alignment=alignment,
    )
    assert loss.item() == pytest.approx(documented_loss(row), abs=1e-6)


def choices(model: type[BaseModel], field: str) -> set[str]:
    return set(get_args(model.model_fields[field].annotation)) - {"none"}


def test_the_page_of_objectives_names_every_number_of_every_loss() -> None:
    page = (Path(__file__).parents[2] / "docs/objectives.md").read_text(encoding="utf-8")
    table = page.partition("## Numbers to watch")[2].partition("Arithmetic:")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    of_the_run = {"effective_sample_share", "entropy", "entropy_coefficient", "kl_teacher"}
    tokens = torch.full((2, 3), -0.5, requires_grad=True)
    inputs = LossInputs(
        logprobs=tokens,
        advantages=torch.ones(2, 3),
        loss_mask=torch.ones(2, 3),
        inference_logprobs=tokens.detach(),
        ref_logprobs=tokens.detach(),
    )
    found = set(resolve_loss("weighted_sft", correction={"weight": "icepop"})(inputs)[1])
    found |= resolve_loss("ppo_clip", dual_clip=3.0)(inputs)[1].keys()
    for name in BUILT_IN_LOSSES:
        found |= resolve_loss(name)(inputs)[1].keys()
    assert set(re.findall(r"`(\w+)`", " ".join(cells))) == found | of_the_run


def test_the_page_of_objectives_has_a_row_for_every_choice() -> None:
    page = (Path(__file__).parents[2] / "docs/objectives.md").read_text(encoding="utf-8")
    first_cells = " ".join(line.split("|")[1] for line in page.splitlines() if line.startswith("|"))
    wanted = {
        *BUILT_IN_LOSSES,
        *choices(LossSettings, "reduction"),
        *choices(KlOptions, "kl_estimator"),
        *choices(CorrectionOptions, "weight"),
        *choices(CorrectionOptions, "reject"),
    }
    assert wanted - set(re.findall(r"\w+", first_cells)) == set()
    assert BUILT_IN_LOSSES.keys() <= set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE))

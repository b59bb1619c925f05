"""Every objective that verl or TRL has gives their loss and gradient, however the batch is laid out and cut.

`tests/oracle/values.json` is what the two libraries computed, see `make oracle`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.extensions import BUILT_IN_LOSSES
from trainer.losses import LossInputs, resolve_loss

ORACLE = json.loads((Path(__file__).parents[1] / "oracle/values.json").read_text())
ROWS = pytest.mark.parametrize(
    "row", ORACLE["values"], ids=lambda row: f"{row['mode']}-{row['library']}-{row['batch']}"
)
NO_LIBRARY_HAS = {"decoupled_ppo", "prime", "ipo"}
"""Their references are in `test_objective_definitions.py`."""


def denominators(reduction: str, mask: Tensor, library: str) -> Tensor:
    """What each token's term is divided by, [B, 1]."""
    lengths = mask.sum(1, keepdim=True)
    sequences = (lengths > 0).sum()
    if reduction == "sequence" and library == "verl":
        return sequences * (lengths + 1e-8)  # verl's own guard against empty rows
    return {
        "token": mask.sum().expand_as(lengths),
        "sequence": sequences * lengths,
        "constant": (sequences * ORACLE["constant_length"]).expand_as(lengths),
        "token_sum": torch.ones_like(lengths),
        "rows": len(mask) * lengths,  # counts wholly masked rows too
        "constant_rows": torch.full_like(lengths, len(mask) * ORACLE["constant_length"]),
    }[reduction]


def columns_of(row: dict[str, Any]) -> dict[str, Tensor]:
    batch = {
        name: torch.tensor(values, dtype=torch.float64)
        for name, values in ORACLE["batches"][row["batch"]].items()
    }
    mask = batch["mask"]
    return {
        "logprobs": batch["policy"],
        "advantages": batch["advantages"],
        "loss_mask": mask,
        "inference_logprobs": batch["sampler"],
        "ref_logprobs": batch["reference"],
        "denominator": denominators(row["reduction"], mask, row["library"]).expand_as(mask),
        "sequence_ids": torch.arange(len(mask))[:, None].expand_as(mask),
    }


def computed(
    row: dict[str, Any], parts: list[dict[str, Tensor]], *, as_a_run: bool
) -> tuple[float, list[float]]:
    """Sum of the losses of micro-batches, and their gradients one after another where the mask is not 0.

    Args:
        row: Of the file.
        parts: The micro-batches.
        as_a_run: Take what a loss needs of the whole step beforehand, as a run does.
    """
    loss = resolve_loss(row["loss"], **row["options"])
    statistics = None
    if loss.step_statistics is not None and as_a_run:
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        before = whole | {"logprobs": whole["inference_logprobs"]}
        statistics = loss.step_statistics(LossInputs(**before), loss.options)
    total, gradients = 0.0, []
    for part in parts:
        logprobs = part["logprobs"].clone().requires_grad_()
        value, _ = loss(LossInputs(**(part | {"logprobs": logprobs}), statistics=statistics))
        (gradient,) = torch.autograd.grad(value, logprobs)
        total += value.item()
        gradients.extend(gradient[part["loss_mask"] != 0].tolist())
    return total, gradients


def whole(columns: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [columns]


def packed(columns: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    kept = columns["loss_mask"] != 0
    return [{name: values[kept] for name, values in columns.items()}]


def cut(columns: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """A micro-batch for each sequence, the wholly masked one too, packed."""
    return [
        {name: values[index][columns["loss_mask"][index] != 0] for name, values in columns.items()}
        for index in range(len(columns["loss_mask"]))
    ]


@ROWS
def test_the_loss_and_its_gradient_are_those_of_the_library(row: dict[str, Any]) -> None:
    # verl's GMPO divides by the sequence's tokens and 1e-8, inside an exponential.
    relative = 1e-7 if row["loss"] == "gmpo" else 1e-10
    for layout in (whole, packed):
        value, gradient = computed(row, layout(columns_of(row)), as_a_run=False)
        assert value == pytest.approx(row["value"], rel=relative, abs=1e-12)
        assert gradient == pytest.approx(row["gradient"], rel=relative, abs=1e-12)


@ROWS
def test_the_sum_over_micro_batches_is_that_of_the_whole_step(row: dict[str, Any]) -> None:
    columns = columns_of(row)
    value, gradient = computed(row, packed(columns), as_a_run=True)
    cut_value, cut_gradient = computed(row, cut(columns), as_a_run=True)
    assert cut_value == pytest.approx(value, rel=1e-12, abs=1e-14)
    assert cut_gradient == pytest.approx(gradient, rel=1e-12, abs=1e-14)


def test_no_objective_is_left_out() -> None:
    assert {row["loss"] for row in ORACLE["values"]} | NO_LIBRARY_HAS == set(BUILT_IN_LOSSES)

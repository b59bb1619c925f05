"""One broken tensor among all others is found, whichever it is and however it is broken, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.trainer.models import VOCABULARY, tiny_model
from trainer.publish import Verdict, score_with_model
from trainer.publish.verification.compare_logprobs import TOLERANCES, Baseline, compare

PROBES = [[(seed * 31 + 7 * position * position) % VOCABULARY for position in range(30)] for seed in range(6)]

USUAL = 1e-5
"""Nats: how far float32 servers were off with equal weights."""

Corruption = Callable[[Tensor], Tensor]

CORRUPTIONS: dict[str, Corruption] = {
    "zeroed": torch.zeros_like,
    "shuffled": lambda weight: weight.flatten()[torch.randperm(weight.numel())].view_as(weight),
    "transposed": lambda weight: weight.t().reshape(weight.shape) if weight.ndim == 2 else weight.flip(0),
    "scaled": lambda weight: weight * 1.5,
}


def trained_model(architecture: str) -> Any:
    """A tiny model whose every tensor matters: as it is initialized most of them hardly do."""
    model = tiny_model(architecture, dtype=torch.float32).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return model


def tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that scoring can depend on: a key's bias shifts all attention of a query alike."""
    for name, parameter in model.named_parameters():
        if not name.endswith("k_proj.bias"):
            yield name, parameter


def other_layers(model: Any, name: str) -> Tensor | None:
    """The same tensor of the other layer."""
    swapped = name.replace(".0.", ".x.").replace(".1.", ".0.").replace(".x.", ".1.")
    return None if swapped == name else dict(model.named_parameters())[swapped]


def verdict(model: Any, expected: list[list[float]]) -> Verdict:
    served = score_with_model(model, PROBES, "cpu")
    return compare(served, expected, tolerance=TOLERANCES["float32"], usual=USUAL).verdict


def test_every_tensor_broken_in_every_way_is_found() -> None:
    model = trained_model("qwen2")
    expected = score_with_model(model, PROBES, "cpu")
    assert verdict(model, expected) is Verdict.MATCH
    missed, tried = [], 0
    for name, parameter in tensors(model):
        right = parameter.detach().clone()
        broken = {how: corrupt(right) for how, corrupt in CORRUPTIONS.items()}
        other = other_layers(model, name)
        if other is not None:
            broken["another layer's"] = other.detach().clone()
        for how, wrong in broken.items():
            with torch.no_grad():
                parameter.copy_(wrong)
            tried += 1
            if verdict(model, expected) is Verdict.MATCH:
                missed.append((name, how))
        with torch.no_grad():
            parameter.copy_(right)
    assert tried > 80
    assert missed == []


def test_a_tensor_that_kept_its_last_version_is_found_if_the_step_was_not_tiny() -> None:
    """What cannot be found: a tensor that is old by so little that the probes do not show it."""
    model = trained_model("llama")
    old = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    before = score_with_model(model, PROBES, "cpu")
    found: dict[float, int] = {}
    for size in (1e-2, 3e-6):
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                tensor.copy_(old[name] + size * torch.randn_like(tensor))
        expected = score_with_model(model, PROBES, "cpu")
        found[size] = 0
        for name, tensor in tensors(model):
            new = tensor.detach().clone()
            with torch.no_grad():
                tensor.copy_(old[name])
            found[size] += verdict(model, expected) is not Verdict.MATCH
            with torch.no_grad():
                tensor.copy_(new)
        # The whole model left at the old version is found either way.
        baseline = Baseline(expected=before, served=before)
        whole = compare(before, expected, tolerance=TOLERANCES["float32"], baseline=baseline)
        assert not whole.matches
    count = len(list(tensors(model)))
    assert found[1e-2] == count
    assert found[3e-6] < count

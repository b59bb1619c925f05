"""examples/weighted_sft.py, run as a reader runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "weighted_sft.py"


def run_example(*arguments: str) -> str:
    finished = subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def output() -> str:
    return run_example()


def test_shows_the_seeds_shapes_and_its_18_valid_tokens(output: str) -> None:
    for line in (
        "Input tokens shape: torch.Size([2, 18])",
        "Advantages shape: torch.Size([2, 18])",
        "Loss mask shape: torch.Size([2, 18])",
        "Flattened logits shape: torch.Size([34, 50257])",
        "Valid tokens: 18.0",
        "Loss requires grad: True",
    ):
        assert line in output


def test_the_loss_of_the_function_is_the_sum_that_was_shown(output: str) -> None:
    total = re.search(r"Sum (-?[\d.]+) / 18\.0 valid tokens", output)
    final = re.search(r"Final loss: (-?[\d.]+)", output)
    assert total is not None
    assert final is not None
    assert float(final[1]) == pytest.approx(float(total[1]) / 18.0, abs=1e-4)


def test_calls_backward_and_shows_a_gradient(output: str) -> None:
    shown = re.search(r"gradient norm ([\d.]+)", output)
    assert shown is not None
    assert float(shown[1]) > 0


def test_masked_tokens_weigh_nothing_and_unmasked_ones_their_advantage(output: str) -> None:
    samples = [
        [float(value) for value in values.split(", ")]
        for values in re.findall(r"\(sample\): +\[(.*?)\]", output)
    ]
    first, second = samples[:4], samples[4:]
    assert first[3] == [0.0] * 5
    for cross_entropy, advantage, mask, weighted in zip(*second, strict=True):
        assert mask == 1.0
        assert weighted == pytest.approx(cross_entropy * advantage, abs=0.1)

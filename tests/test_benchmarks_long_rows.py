"""The benchmark of what long rows take: its arithmetic, and that it measures."""

from __future__ import annotations

import pytest

from benchmarks.balance import QWEN3_8B
from benchmarks.long_rows import SMALL, layer_inputs, peak_bytes


def test_the_layer_inputs_of_qwen3_8b_take_590_kb_a_token() -> None:
    assert layer_inputs(QWEN3_8B) == 589_824


def test_a_row_takes_at_least_the_inputs_of_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert peak_bytes(1024) > 1024 * layer_inputs(SMALL)

"""What the memory benchmark compares with, and that it runs what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.memory import (
    CASES,
    Case,
    above_imports,
    chosen,
    count_parameters,
    measure_processes,
    model_config,
)
from benchmarks.step._models import write_random_model


def test_the_largest_group_is_a_layer_and_a_tied_embedding_counts_once() -> None:
    layer = 4 * 768 * 768 + 3 * 768 * 2048 + 2 * 768
    for layers in (1, 13):
        assert count_parameters(model_config(layers)) == (8192 * 768 + layers * layer + 768, layer)


def test_a_share_is_expected_where_weights_are_spread_only() -> None:
    assert [case.expected(1000, 10) for case in chosen("4:sharded,2:replicated")] == [4040, 16_040]
    assert chosen("") == list(CASES)


@pytest.mark.slow
def test_a_run_takes_its_weights_with_gradients_and_moments_and_not_one_of_them_twice(tmp_path: Path) -> None:
    """One process under a launcher: nothing is put around its model that is for several."""
    config = model_config(4)
    model = write_random_model(config, tmp_path / "model")
    (peaks,) = measure_processes(Case(1, "replicated"), model)
    assert {"loading", "training", "publishing", "checkpointing"} <= peaks.keys()
    parameters, _ = count_parameters(config)
    assert 16 * parameters < above_imports(peaks) < 20 * parameters

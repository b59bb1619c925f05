"""What the memory benchmark compares with, and that it runs what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.memory import count_parameters, measure_processes, model_config
from benchmarks.step._models import write_random_model


def test_the_largest_group_is_a_layer_and_a_tied_embedding_counts_once() -> None:
    layer = 4 * 768 * 768 + 3 * 768 * 2048 + 2 * 768
    for layers in (1, 13):
        assert count_parameters(model_config(layers)) == (8192 * 768 + layers * layer + 768, layer)


@pytest.mark.slow
def test_a_run_takes_more_than_its_weights_with_gradients_and_moments(tmp_path: Path) -> None:
    config = model_config(1)
    model = write_random_model(config, tmp_path / "model")
    (imports,) = measure_processes(1, "none", model, tmp_path / "imports")
    (peak,) = measure_processes(1, "replicated", model, tmp_path / "run")
    assert peak - imports > 16 * count_parameters(config)[0]

"""What the memory benchmarks compare with, and that they measure what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import publish_memory
from benchmarks.memory import CASES, above_imports, chosen, count_parameters, main, model_config
from benchmarks.step._models import write_random_model
from tests.forked import forked_ranks
from trainer.model.sharding import GATHERED_BYTES


def test_the_largest_group_is_a_layer_and_a_tied_embedding_counts_once() -> None:
    layer = 4 * 768 * 768 + 3 * 768 * 2048 + 2 * 768
    for layers in (1, 13):
        assert count_parameters(model_config(layers)) == (8192 * 768 + layers * layer + 768, layer)


def test_a_share_is_expected_where_weights_are_spread_only() -> None:
    assert [case.expected(1000, 10) for case in chosen("4:sharded,2:replicated")] == [4040, 16_040]
    assert chosen("") == list(CASES)


def test_a_publish_may_take_the_largest_weight_and_two_buckets_and_what_it_holds_meanwhile() -> None:
    allowed = [publish_memory.Case(4, way).allowed(1000, 100, 7) for way in ("disk", "overlap", "delta")]
    assert [each - 2 * GATHERED_BYTES - 100 for each in allowed] == [14, 264, 264]


@pytest.mark.parametrize("words", [["--layers", "0"], ["--layers", "-3"]])
def test_a_model_without_layers_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "argument --layers: must be 1 or more" in capsys.readouterr().err


def measured(processes: int, module: str, model: Path, output: Path, port: int, *words: str) -> list[Any]:
    """What each process of a run has written."""
    log = output.with_name("log")
    told = ["--measure", model, output, *words]
    ranks = forked_ranks(processes, port, module, told, stdout=log, stderr=log)
    try:
        assert [rank.wait(200) for rank in ranks] == [0] * processes, log.read_text()[-3000:]
    finally:
        for rank in ranks:
            rank.kill()
    return [json.loads(Path(f"{output}.{rank}").read_text()) for rank in range(processes)]


@pytest.mark.slow
def test_each_process_notes_what_every_publish_takes(tmp_path: Path, free_port: int) -> None:
    model = write_random_model(model_config(1, hidden=64), tmp_path / "model")
    words = (model, tmp_path / "run", free_port, "--way", "delta")
    for publishes in measured(2, "benchmarks.publish_memory", *words):
        assert len(publishes) == 3, "at the start, and after each of two steps"
        assert publishes[0]["changed"] == 0 < publishes[1]["changed"]
        assert all(publish["above_bytes"] > 0 for publish in publishes)


@pytest.mark.slow
def test_a_run_takes_its_weights_with_gradients_and_moments_and_not_one_of_them_twice(
    tmp_path: Path, free_port: int
) -> None:
    """One process under a launcher: nothing is put around its model that is for several."""
    config = model_config(4)
    model = write_random_model(config, tmp_path / "model")
    words = (model, tmp_path / "run", free_port, "--mode", "replicated")
    (peaks,) = measured(1, "benchmarks.memory", *words)
    assert {"loading", "training", "publishing", "checkpointing"} <= peaks.keys()
    parameters, _ = count_parameters(config)
    assert 16 * parameters < above_imports(peaks) < 20 * parameters

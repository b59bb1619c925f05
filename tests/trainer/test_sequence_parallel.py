"""Processes that share the columns of a micro-batch compute what one process does."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.forked import forked_ranks
from tests.trainer.models import tiny_model
from trainer.errors import ConfigurationError
from trainer.model.attention import TILED, register_backends, require_splittable
from trainer.model.sequence_parallel import SequenceGroup
from trainer.packing import Packing


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])  # as many as there are heads of keys, and twice that
def test_log_probs_and_gradients_are_those_of_one_process(count: int, tmp_path: Path, free_port: int) -> None:
    log = tmp_path / "log"
    ranks = forked_ranks(count, free_port, "tests.trainer.split_columns", [], stdout=log, stderr=log)
    try:
        assert [rank.wait(120) for rank in ranks] == [0] * count, log.read_text()[-5000:]
    except subprocess.TimeoutExpired as error:
        raise AssertionError(log.read_text()[-5000:]) from error
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize(
    ("packing", "attention", "size", "message"),
    [
        ("padded", TILED, 2, "sequences are padded"),
        ("prefix_tree", "sdpa", 2, "set model.attention to tiled or flex"),
        ("prefix_tree", TILED, 3, "has 4 attention heads, which cannot be divided so"),
    ],
)
def test_what_cannot_be_split_is_refused(packing: Packing, attention: str, size: int, message: str) -> None:
    register_backends()
    group = SequenceGroup(size=size, rank=0, group=None)
    with pytest.raises(ConfigurationError, match=message):
        require_splittable(tiny_model("llama", attention=attention), packing, group)

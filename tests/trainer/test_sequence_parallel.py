"""Processes that share the columns of a micro-batch compute what one process does."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from tests.forked import forked_ranks
from trainer.model.sequence_parallel import SequenceGroup


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


def test_heads_that_cannot_be_divided_are_refused() -> None:
    group = SequenceGroup(size=2, rank=0, group=None)
    odd = torch.zeros(1, 3, 4, 8)
    with pytest.raises(ValueError, match="3 attention heads cannot be divided among 2 processes"):
        group.attend(lambda *_: odd, odd, odd, odd, None, None)

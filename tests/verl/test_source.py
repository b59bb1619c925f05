"""What our source makes of verl's checkpoints."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.verl.engines import config_for
from trainer.samples.validation import ModelLimits
from verl_integration.source import AtroposBatches


def make_batches(tmp_path: Path, checkpoints: int | None) -> Any:
    limits = ModelLimits(vocabulary_size=259, max_sequence_length=256)
    config = config_for(tmp_path / "model", tmp_path / "run")
    return AtroposBatches(config, limits=limits, keep_all=False, checkpoints=checkpoints)


def test_bodies_go_when_the_checkpoints_that_verl_keeps_need_them_no_more(tmp_path: Path) -> None:
    batches, pruned = make_batches(tmp_path, 2), []
    batches._journal = SimpleNamespace(prune=pruned.append)
    for counted in (4, 9, 15):
        batches.tracker = SimpleNamespace(settled=SimpleNamespace(batches=counted))
        batches.note_checkpoint()
    assert pruned == [4, 9]


def test_what_a_loader_of_verls_saved_is_no_place_to_go_on_from(tmp_path: Path) -> None:
    batches = make_batches(tmp_path, None)
    batches.load_state_dict({"_num_yielded": 3})
    assert batches.state.step == 0  # which the trainer refuses where verl's weights are older

"""A run that is killed again and again ends as if it had never been: bit for bit, and each batch once.

Real processes throughout: an Atropos API, the trainer, its fetching process, an inference server that loads
what is published. `CHAOS_SEED` chooses other moments.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from atropos_client.journal import Journal
from tests.chaos.deaths import KINDS
from tests.chaos.stack import whole_stack

SEED = int(os.environ.get("CHAOS_SEED", "0"))
stack_of_a_run = contextmanager(whole_stack)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "steps"),
    [
        pytest.param(5, 40, id="5 kills", marks=pytest.mark.timeout(600)),
        pytest.param(50, 400, id="50 kills", marks=[pytest.mark.chaos, pytest.mark.timeout(3600)]),
    ],
)
def test_a_run_that_is_killed_at_random_moments_equals_the_uninterrupted_run_bit_for_bit(
    kills: int,
    steps: int,
    tiny_model_directory: Path,
    tmp_path: Path,
    start_inference_server: Callable[..., Any],
) -> None:
    options = {
        "model": tiny_model_directory,
        "start_inference_server": start_inference_server,
        "steps": steps,
    }
    with stack_of_a_run(tmp_path / "whole", **options) as (whole, whole_engine):
        life = whole.live()
        assert not life.killed
    with stack_of_a_run(tmp_path / "killed", **options) as (killed, engine):
        lives = killed.live_through(kills, SEED, longest_life=2.0)
    deaths = [life for life in lives if life.killed]
    print(f"\n{len(deaths)} kills, seed {SEED}; uninterrupted: {life.seconds:.1f} s")  # noqa: T201 - figures
    for each in lives:
        how = each.death if each.killed else "lived on"
        print(f"  {each.seconds:5.1f} s, up to step {each.steps:3d}: {how}")  # noqa: T201
    assert len(deaths) == kills
    assert {each.death.kind for each in deaths if each.death is not None} == set(KINDS)

    assert killed.final_weights() == whole.final_weights()
    assert killed.checkpoint_files() == whole.checkpoint_files()
    assert "optimizer.safetensors" in whole.checkpoint_files()
    assert killed.state() == whole.state()
    assert killed.losses() == whole.losses()

    # Each batch once, in its order, none missing.
    assert killed.ledger() == whole.ledger()
    assert [row[0] for row in killed.ledger()] == list(range(1, steps + 1))
    assert {(row[3], row[4]) for row in killed.ledger()} == {("trained", n) for n in range(1, steps + 1)}
    with Journal.read_only(killed.output / "journal") as journal:
        assert journal.verify().problems == ()

    # Every version that was ever served is the one that the uninterrupted run served under its number.
    # Version 0 is what the server began with; only a restart makes it load it.
    assert whole_engine.served.keys() == set(range(1, steps + 1))
    assert all(len(digests) == 1 for digests in whole_engine.served.values())
    assert len(engine.served.pop(0, {"as it began"})) == 1
    assert engine.served == whole_engine.served
    assert engine.weight_version == str(steps)
    assert killed.leftovers() == []

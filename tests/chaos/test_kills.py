"""The trainer, its fetching process, or both are killed at random moments: each batch is trained once.

What cannot be promised is the batch whose reply is on its way to a fetching process that is killed: it is
counted as possibly lost. `CHAOS_SEED` chooses other moments.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from atropos_client import AtroposClient, parse_batch
from atropos_client.journal import Journal
from tests.atropos_client.test_real_api import RealApi
from tests.chaos.stack import GROUPS_IN_A_BATCH, RecordedEnvironment, Stack, recorded_groups

SEED = int(os.environ.get("CHAOS_SEED", "0"))
STEPS_BETWEEN_KILLS = 8
VICTIMS = ("fetcher", "trainer", "both")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(10, id="10 kills", marks=pytest.mark.timeout(600)),
        pytest.param(40, id="40 kills", marks=[pytest.mark.chaos, pytest.mark.timeout(3600)]),
    ],
)
def test_each_batch_is_trained_once_whoever_is_killed(
    kills: int, tiny_model_directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    generator = random.Random(SEED)
    steps = STEPS_BETWEEN_KILLS * kills
    victims = [victim for _, victim in zip(range(kills), itertools.cycle(VICTIMS), strict=False)]
    generator.shuffle(victims)
    groups = recorded_groups(steps + kills)  # more than enough if every kill costs a batch
    with RealApi() as api, AtroposClient(api.url) as client:
        RecordedEnvironment(api.url, groups)
        stack = Stack(tmp_path / "run", model=tiny_model_directory, api=api.url, steps=steps)
        trainer = stack.start()
        for victim in victims:
            enough = min(stack.steps() + generator.randrange(STEPS_BETWEEN_KILLS), steps - 1)
            stack.wait_for(trainer, steps=enough)
            time.sleep(generator.uniform(0.0, 0.2))
            assert trainer.is_alive(), stack.log.read_text()[-3000:]
            trainer = kill(victim, trainer, stack)
        trainer.join(240)
        assert trainer.exitcode == 0, stack.log.read_text()[-3000:]
        left = 0
        while parse_batch(client.fetch_batch()).state == "ready":
            left += 1
    said = " ".join(stack.log.read_text().split()).count("so that a batch is possibly lost")
    with Journal.read_only(stack.output / "journal") as journal:
        ledger = list(journal.ledger())
        assert journal.verify().problems == ()
    lost = len(groups) // GROUPS_IN_A_BATCH - left - len(ledger)
    with capfd.disabled():
        print(f"\n{kills} kills, seed {SEED}: {lost} batches lost, {said} said to be possibly lost")  # noqa: T201
    assert [entry.number for entry in ledger] == list(range(1, len(ledger) + 1))
    assert len({entry.sha256 for entry in ledger}) == len(ledger)
    assert [entry.step for entry in ledger[:steps]] == list(range(1, steps + 1))
    assert {entry.outcome for entry in ledger[steps:]} <= {"received"}
    assert [row[:2] for row in stack.losses()] == [(step, step) for step in range(1, steps + 1)]
    assert 0 <= lost <= said  # by the trainer; where both are killed, by the next one
    assert said <= len(victims) - victims.count("trainer")


def kill(victim: str, trainer: BaseProcess, stack: Stack) -> BaseProcess:
    """Kill, and start a trainer where there is none any more."""
    assert trainer.pid is not None
    fetcher = child_of(trainer.pid)
    if victim != "trainer" and fetcher is not None:
        with suppress(ProcessLookupError):
            os.kill(fetcher, signal.SIGKILL)
    if victim == "fetcher":
        return trainer
    trainer.kill()
    trainer.join(60)
    return stack.start()


def child_of(pid: int) -> int | None:
    """The process that a trainer has started, whichever of its threads did; None: there is none."""
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in listing.read_text().split():
                return int(child)
    return None

"""A long run through faults and restarts accounts for every batch and holds no more in the end than before.

Real processes throughout: `atropos-train run` with its fetching process, the Atropos API, an inference server
that loads what is published. Proxies between them spoil one request in twenty; API and inference server are
killed and started again. `SOAK_SEED` chooses other faults and moments.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atropos_client.journal import LedgerEntry
from tests.soak.account import Account
from tests.soak.environment import GROUPS_IN_A_BATCH
from tests.soak.faulty_proxy import KINDS
from tests.soak.run import Plan, soak

SEED = int(os.environ.get("SOAK_SEED", "0"))
STEPS = int(os.environ.get("SOAK_STEPS", "2000"))

SHORT = Plan(steps=150, restarts=2, publish_every=5, checkpoint_every=20, sample_every=0.1, seed=SEED)
LONG = Plan(steps=STEPS, restarts=5, publish_every=10, checkpoint_every=50, sample_every=0.25, seed=SEED)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc, which this system lacks")
@pytest.mark.parametrize(
    ("plan", "growth"),
    [
        pytest.param(SHORT, 0.10, id="short", marks=pytest.mark.timeout(900)),
        pytest.param(LONG, 0.02, id="long", marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
    ],
)
def test_every_batch_of_a_run_through_faults_and_restarts_is_accounted_for_and_nothing_piles_up(
    plan: Plan, growth: float, tiny_model_directory: Path, tmp_path: Path
) -> None:
    outcome = soak(tiny_model_directory, tmp_path, plan)
    assert outcome.exit_code == 0, outcome.log[-6000:]
    account = Account(outcome)
    account.print()
    _check_batches(account)
    _check_that_the_books_notice(account)
    _check_disturbances(account)
    _check_holdings(account, growth)


def _check_batches(account: Account) -> None:
    outcome = account.outcome
    _check_what_the_api_did(account)
    # From the API into the ledger: what arrived is there once, and nothing else is.
    recorded = Counter(entry.sha256 for entry in account.ledger)
    assert recorded == account.delivered + account.garbage
    assert [entry.number for entry in account.ledger] == list(range(1, len(account.ledger) + 1))
    # What became of each: trained at one step each, passed over for a reason, or ready for the next run.
    steps = [entry.step for entry in account.ledger if entry.outcome == "trained"]
    assert steps == list(range(1, outcome.plan.steps + 1))
    aside = {entry.sha256 for entry in account.ledger if entry.outcome == "set_aside"}
    assert aside <= account.garbage.keys()
    assert all(entry.reason for entry in account.ledger if entry.outcome in ("set_aside", "skipped"))
    waiting = [entry.number for entry in account.ledger if entry.outcome == "received"]
    assert len(waiting) <= 2
    assert waiting == list(range(len(account.ledger) + 1 - len(waiting), len(account.ledger) + 1))
    # What did not arrive has been counted, and whatever was counted has a cause.
    # The fetching process may be in the middle of a poll when the trainer ends: nobody hears how that went.
    assert account.doubtful - account.counters.get("intake_possibly_lost", 0) in (0, 1)
    assert account.cut_off + account.broken_by_the_api <= account.doubtful
    assert account.counters.get("intake_unreadable", 0) == account.garbage.total()


def _check_that_the_books_notice(account: Account) -> None:
    """Wrong books of the same run are refused: a batch lost, trained twice, changed, or not counted."""
    ledger = account.ledger
    middle = next(place for place, entry in enumerate(ledger) if entry.outcome == "trained" and place > 2)
    entry = ledger[middle]
    renumbered = [
        replace(each, number=number) for number, each in enumerate(_without(ledger, middle), start=1)
    ]
    uncounted = {**account.counters, "intake_possibly_lost": account.counters["intake_possibly_lost"] - 2}
    wrong: list[dict[str, Any]] = [
        {"ledger": _without(ledger, middle)},
        {"ledger": renumbered},
        {"ledger": [*ledger, replace(entry, number=len(ledger) + 1, outcome="received", step=None)]},
        {"ledger": [*ledger, replace(entry, number=len(ledger) + 1)]},
        {"ledger": _with(ledger, middle, replace(entry, sha256="0" * 64))},
        {"ledger": _with(ledger, middle, replace(entry, outcome="skipped", step=None, reason="none"))},
        {"counters": uncounted},
    ]
    for books in wrong:
        another = Account(account.outcome)
        vars(another).update(books)
        with pytest.raises(AssertionError):
            _check_batches(another)


def _without(ledger: list[LedgerEntry], place: int) -> list[LedgerEntry]:
    return [*ledger[:place], *ledger[place + 1 :]]


def _with(ledger: list[LedgerEntry], place: int, entry: LedgerEntry) -> list[LedgerEntry]:
    return [*ledger[:place], entry, *ledger[place + 1 :]]


def _check_what_the_api_did(account: Account) -> None:
    """All that was pushed is given away, broken, gone with an API that was killed, or still there."""
    environment = account.outcome.environment
    # What each API says it had, before it was killed and in the end, is what it had been sent.
    assert len(environment.statements) == account.outcome.plan.restarts + 1
    for said in environment.statements:
        assert said.pushed * GROUPS_IN_A_BATCH == said.formed * GROUPS_IN_A_BATCH + said.groups_queued
    # What was left is counted by taking it, not by subtraction.
    assert environment.left == environment.waiting
    # Nothing was given away that had not been pushed, and nothing twice.
    assert max(environment.groups.values()) == 1
    seen = account.groups_handed_out + environment.left_groups
    assert seen <= environment.groups
    assert max(account.handed_out.values()) == 1
    # The groups that nobody has seen again are those of the batches that broke or were in a killed API.
    broken_now = environment.left - environment.left_groups.total() // GROUPS_IN_A_BATCH
    unseen = account.broken_by_the_api + environment.forgotten + broken_now
    assert (environment.groups - seen).total() == unseen * GROUPS_IN_A_BATCH


def _check_disturbances(account: Account) -> None:
    """The run was disturbed as planned, and got over it."""
    outcome = account.outcome
    for passages in (outcome.to_api, outcome.to_inference):
        faults = Counter(passage.fault for passage in passages if passage.fault is not None)
        assert faults.total()
        if outcome.plan.steps >= 2000:  # enough for each kind, and for the share
            assert faults.keys() == set(KINDS)
            assert 0.03 < faults.total() / len(passages) < 0.07
    assert outcome.restarts == {"api": outcome.plan.restarts, "inference": outcome.plan.restarts}
    assert account.counters["intake_re_registrations"] >= outcome.plan.restarts
    assert account.outcomes["skipped"]
    assert account.counters["set_aside_groups_total"] > account.outcomes["skipped"]
    assert outcome.served == str(outcome.plan.steps)
    published = [row["version"] for row in account.rows if row["kind"] == "publish"]
    every = outcome.plan.publish_every
    assert published == list(range(0, outcome.plan.steps + 1, every))


def _check_holdings(account: Account, growth: float) -> None:
    assert len(account.outcome.sampler.fetchers) == 1, "the fetching process died"
    for party in ("trainer", "fetcher"):
        for measure in ("memory", "resident"):
            assert account.steadiness(party, measure).growth < growth, (party, measure)
        for measure in ("files", "threads"):
            steady = account.steadiness(party, measure)
            assert steady.fourth <= steady.third, (party, measure, steady)

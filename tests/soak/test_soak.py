"""A long run in which a share of all requests goes wrong and servers are killed: nothing lost, nothing grows.

Real processes throughout: the Atropos API, the trainer with its fetching process and journal, an inference
server that loads what is published. Between them stand proxies that spoil requests. `SOAK_SEED` draws other
faults.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from atropos_client.journal import Journal, LedgerEntry
from tests.atropos_client.test_real_api import RealApi
from tests.chaos.stack import GROUP_SIZE, GROUPS_IN_A_BATCH, Stack
from tests.soak.proxy import FaultyProxy
from tests.soak.sampling import Sample, Sampler, trend_of
from tests.soak.servers import EndlessEnvironment, InferenceProcess

SEED = int(os.environ.get("SOAK_SEED", "0"))
FAULTY_SHARE = 0.05
MOST_GROWTH = 0.02
SETTINGS = (
    *("--publish.every", "10", "--checkpoint.every", "20", "--checkpoint.keep", "2"),
    *(
        "--health.file_every",
        "0.5",
        "--train.set_aside_alarm",
        "null",
        "--data.advantage_normalization",
        "batch",
    ),
    *("--publish.watch_interval", "1", "--train.seed", str(SEED)),
)


@dataclass(frozen=True, kw_only=True)
class Soaked:
    """What is left of a run."""

    seconds: float
    pushed: int
    """Groups."""
    polls: Counter[str]
    faults: Counter[str]
    requests: int
    ledger: list[LedgerEntry]
    possibly_lost: int
    """As the trainer counted."""
    problems: tuple[str, ...]
    """Of the journal's bodies."""
    trainer: list[Sample]
    fetcher: list[Sample]
    restarts: Counter[str] = field(default_factory=Counter)

    @property
    def outcomes(self) -> Counter[str]:
        """Batches by outcome."""
        return Counter(entry.outcome for entry in self.ledger)


def soak(model: Path, directory: Path, *, steps: int, restarts: int) -> Soaked:
    """Run it."""
    log = directory / "inference.log"
    started = time.monotonic()
    with (
        log.open("wb") as inference_log,
        RealApi() as api,
        InferenceProcess(model, inference_log) as inference,
        FaultyProxy(api.url, share=FAULTY_SHARE, seed=SEED) as before_api,
        FaultyProxy(inference.url, share=FAULTY_SHARE, seed=SEED + 1) as before_inference,
        EndlessEnvironment(api.url, queued=4 * GROUPS_IN_A_BATCH * GROUP_SIZE, seed=SEED) as environment,
    ):
        stack = Stack(
            directory / "run", model=model, api=before_api.url, inference=before_inference.url, steps=steps
        )
        process = stack.start(*SETTINGS)
        assert process.pid is not None
        done: Counter[str] = Counter()
        with Sampler(process.pid, every=0.25 if steps < 1000 else 1.0) as sampler:
            servers: dict[str, Any] = {"API": api, "inference server": inference}
            with restarting(process, stack, servers, _moments(steps, restarts), done):
                process.join(3600)
        if process.exitcode is None:
            process.kill()
        assert process.exitcode == 0, f"ended with {process.exitcode}:\n{stack.log.read_text()[-6000:]}"
        polls = before_api.polls
        # The fetching process ends its last poll on its own.
        with Journal.open(stack.output / "journal", wait=120):
            pass
        with Journal.read_only(stack.output / "journal") as journal:
            ledger, problems = list(journal.ledger()), tuple(map(str, journal.verify().problems))
    health = json.loads((stack.output / "health.json").read_text())
    return Soaked(
        seconds=time.monotonic() - started,
        pushed=environment.pushed,
        polls=polls,
        faults=before_api.faults + before_inference.faults,
        requests=before_api.requests + before_inference.requests,
        ledger=ledger,
        possibly_lost=health["batches_possibly_lost"],
        problems=problems,
        trainer=sampler.trainer,
        fetcher=sampler.fetcher,
        restarts=done,
    )


def _moments(steps: int, restarts: int) -> list[tuple[int, str]]:
    """At which steps to kill what: evenly over the run, in turns."""
    names = [name for _ in range(restarts) for name in ("API", "inference server")]
    return [(steps * (number + 1) // (len(names) + 1), name) for number, name in enumerate(names)]


@contextmanager
def restarting(
    process: BaseProcess,
    stack: Stack,
    servers: dict[str, Any],
    moments: Sequence[tuple[int, str]],
    done: Counter[str],
) -> Iterator[None]:
    """Kill servers at the given steps, and start them again, while the block runs."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            for step, name in moments:
                while process.is_alive() and stack.steps() < step:
                    time.sleep(0.1)
                if not process.is_alive():
                    return
                servers[name].kill()
                time.sleep(1.0)
                servers[name].start()
                done[name] += 1
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)
            process.kill()

    thread = threading.Thread(target=run, name="restarts")
    thread.start()
    try:
        yield
    finally:
        thread.join()
        if failures:
            raise failures[0]


def show(soaked: Soaked) -> None:
    """Print the figures."""
    table = Table(title=f"soak, seed {SEED}, {soaked.seconds:.0f} s", title_justify="left", show_header=False)
    trainer, fetcher = trend_of(soaked.trainer), trend_of(soaked.fetcher)

    def quarters(read: Callable[[Sample], Any]) -> str:
        pairs = [(read(trend.third), read(trend.fourth)) for trend in (trainer, fetcher)]
        return ", ".join(f"{third} -> {fourth}" for third, fourth in pairs)

    rows = {
        "groups pushed": soaked.pushed,
        "requests, faults": f"{soaked.requests}, {soaked.faults.total()}: {dict(soaked.faults)}",
        "polls": dict(soaked.polls),
        "batches in the ledger": f"{len(soaked.ledger)}: {dict(soaked.outcomes)}",
        "counted as possibly lost": soaked.possibly_lost,
        "killed and started again": dict(soaked.restarts),
        "MiB, third and last quarter (trainer, fetcher)": quarters(
            lambda each: round(each.memory / 2**20, 1)
        ),
        "growth": f"{trainer.growth:+.2%}, {fetcher.growth:+.2%}",
        "open files": quarters(lambda each: each.files),
        "threads": quarters(lambda each: each.threads),
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    Console(width=140).print(table)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "restarts"),
    [
        pytest.param(200, 1, id="200 batches", marks=pytest.mark.timeout(900)),
        pytest.param(2000, 5, id="2000 batches", marks=[pytest.mark.soak, pytest.mark.timeout(5400)]),
    ],
)
def test_every_batch_is_accounted_for_and_nothing_grows(
    steps: int, restarts: int, tiny_model_directory: Path, tmp_path: Path
) -> None:
    soaked = soak(tiny_model_directory, tmp_path, steps=steps, restarts=restarts)
    show(soaked)

    # The faults came.
    assert soaked.restarts == {"API": restarts, "inference server": restarts}
    injected = soaked.faults.total() - soaked.faults["down"]
    assert 0.5 * FAULTY_SHARE < injected / soaked.requests < 1.5 * FAULTY_SHARE

    # Each batch that arrived is in the ledger once, and has come to an end; each step trained one.
    polls = soaked.polls
    assert [entry.number for entry in soaked.ledger] == list(range(1, len(soaked.ledger) + 1))
    assert len(soaked.ledger) == polls["delivered"] + polls["garbled"] + polls["nothing garbled"]
    trained = [entry.step for entry in soaked.ledger if entry.outcome == "trained"]
    assert sorted(trained) == list(range(1, steps + 1))
    assert set(soaked.outcomes) <= {"trained", "set_aside", "skipped", "received"}
    # Fetched ahead when the last step was done.
    assert all(
        entry.number > max_trained(soaked.ledger) for entry in soaked.ledger if entry.outcome == "received"
    )
    unreadable = [entry for entry in soaked.ledger if (entry.reason or "").startswith("unreadable")]
    assert len(unreadable) <= polls["garbled"] + polls["nothing garbled"]
    assert soaked.problems == ()

    # What did not arrive is counted, and nothing is that could not have been a batch.
    may_be_lost = sum(polls[kind] for kind in ("cut", "nothing cut", "500", "reset", "down"))
    assert polls["cut"] <= soaked.possibly_lost <= may_be_lost

    for samples in (soaked.trainer, soaked.fetcher):
        trend = trend_of(samples)
        assert trend.growth < MOST_GROWTH, "memory grows"
        assert trend.fourth.files <= trend.third.files + 1, "open files grow"
        assert trend.fourth.threads <= trend.third.threads + 1, "threads grow"


def max_trained(ledger: Sequence[LedgerEntry]) -> int:
    """Number of the last batch that a step trained on."""
    return max(entry.number for entry in ledger if entry.outcome == "trained")

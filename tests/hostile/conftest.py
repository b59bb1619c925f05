"""One API server, one misbehaving server and one model for the whole table."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.atropos_client.misbehaving_server import MisbehavingServer
from tests.atropos_client.test_real_api import RealApi
from tests.hostile.brief import check_briefly
from tests.hostile.case import Case
from tests.hostile.harness import Training, configure, train_over_http, training_of
from tests.hostile.table import runs_whole
from tests.trainer.runs import assert_equal_tensors, rows, weights
from trainer import RecordedSource, RunSummary
from trainer.run.build import build_trainer

Check = Callable[..., None]
Weights = dict[str, torch.Tensor]
Run = Callable[..., RunSummary]


@pytest.fixture(scope="session")
def hostile_api() -> Iterator[RealApi]:
    with RealApi() as running:
        yield running


@pytest.fixture(scope="session")
def hostile_server() -> Iterator[MisbehavingServer]:
    with MisbehavingServer() as running:
        yield running


@pytest.fixture(scope="session")
def good_weights(
    tiny_model_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Case], Weights]:
    """Final weights of a run that sees the good parts only; runs that are equal are run once."""
    known: dict[str, Weights] = {}

    def compute(case: Case) -> Weights:
        bodies = case.good_bodies()
        key = repr((bodies, case.options))
        if key not in known:
            output = tmp_path_factory.mktemp("good")
            config = configure(tiny_model_directory, output, "http://unused", training_of(case))
            build_trainer(config, source=RecordedSource(bodies)).run()
            known[key] = weights(output / "final")
        return known[key]

    return compute


@pytest.fixture
def check(
    good_weights: Callable[[Case], Weights],
    tiny_model_directory: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> Check:
    """Run a case and compare what came of it: ``check(case, url)`` or ``check(case, url, run)``."""

    def train(url: str, **options: Any) -> RunSummary:
        return train_over_http(tiny_model_directory, tmp_path, url, training, **options)

    def check_case(case: Case, url: str, run: Callable[[Run], RunSummary] | None = None) -> None:
        nonlocal training
        if run is None and not runs_whole(case):
            check_briefly(case, url, tmp_path)
            return
        training = training_of(case)
        if case.errors:
            with pytest.raises(case.errors, match=re.compile(case.says, re.DOTALL)) as caught:
                train(url)
            check_refusal(caught.value, tiny_model_directory, tmp_path)
            return
        summary = train(url) if run is None else run(train)
        check_outcome(case, summary, tmp_path, caplog.text)
        assert_equal_tensors(weights(tmp_path / "final"), good_weights(case))

    training = Training(steps=0)
    return check_case


def check_refusal(error: BaseException, model: Path, output: Path) -> None:
    """An error of ours, and a checkpoint of untouched weights."""
    assert type(error).__module__ in ("trainer.errors", "atropos_client.errors")
    assert_equal_tensors(weights(output / "checkpoints/step-000000/model"), weights(model))


def check_outcome(case: Case, summary: RunSummary, output: Path, log: str) -> None:
    """Exactly one outcome: what is counted, kept and logged says the same."""
    lost = summary.counters["intake_possibly_lost"]
    if not getattr(case, "may_cost_a_poll", False):
        assert (lost > 0) == (case.outcome == "possibly lost"), summary.counters
    if case.outcome == "possibly lost":
        assert re.search(rf"a batch is possibly lost[^\n]*({case.says})", log), log
    kept = reasons_kept(output)
    assert bool(kept) == (case.outcome == "set aside"), kept
    for reason in kept:
        assert re.search(case.says, reason), reason


def reasons_kept(output: Path) -> list[str]:
    """Why groups and whole batches were set aside; what was kept must be there and readable."""
    directory = output / "set_aside"
    if not directory.is_dir():
        return []
    file = directory / "groups.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    assert all("group" in record for record in records)
    skipped = rows(output, "skipped")
    for row in skipped:
        body = (directory / f"batch-{row['batch']:06d}.json").read_bytes()
        assert row["reason"].startswith("unreadable: ") or json.loads(body)["batch"]
    return [record["reason"] for record in [*records, *skipped]]

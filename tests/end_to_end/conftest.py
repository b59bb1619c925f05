"""Fixtures of the end-to-end tests: whole stacks, cleaned up whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.launching import Launched

Launch = Callable[..., Launched]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start `atropos-train local` with the given words."""
    launched: list[Launched] = []

    def launch(*words: str) -> Launched:
        launched.append(Launched(tmp_path / "run", *words))
        return launched[-1]

    yield launch
    for each in launched:
        each.clean_up()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    """A run of three steps with a tiny model, all the way to its report."""
    run = Launched(
        tmp_path_factory.mktemp("finished") / "run", "--model", "tiny", "--steps", "3", "--seed", "5"
    )
    try:
        run.wait()
        yield run
    finally:
        run.clean_up()

"""Real runs over HTTP: real client, real fetching, real training loop, a tiny model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from atropos_client import RetryPolicy, Timeouts
from atropos_client.fetcher import Fetcher, FetcherSettings
from atropos_client.journal import Journal
from tests.atropos_client.in_thread import ThreadFetcher
from tests.atropos_client.misbehaving_server import Answer, MisbehavingServer
from tests.hostile.case import Case
from trainer import RunSummary, TrainerConfig, load_config
from trainer.run.build import build_trainer
from trainer.sources.live import AtroposSource

PATIENCE = 60.0
"""Seconds; only ends a hang."""

MAX_BODY_BYTES = 16 << 20
"""Largest reply that these runs accept."""

NO_DATA = Answer(body=b'{"batch":null}')


def impatient(settings: FetcherSettings) -> FetcherSettings:
    """The trainer's own settings, with the pauses and the patience of a test."""
    patience = settings.timeouts.batch_read
    changes = {
        "timeouts": Timeouts(batch_read=patience, total=patience),
        "retries": RetryPolicy(attempts=2, first_pause=0.01, longest_pause=0.01),
        "first_pause": 0.01,
        "longest_pause": 0.05,
        "longest_failure_pause": 0.05,
    }
    return settings.model_copy(update=changes)


class ImpatientSource(AtroposSource):
    """The trainer's own source, fetching in a thread."""

    def _make_fetcher(self, journal: Journal, settings: FetcherSettings, **options: Any) -> Fetcher:
        return ThreadFetcher(journal, impatient(settings), **options)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train: what a run over HTTP and the run it is compared with share."""

    steps: int
    batch_size: int = 4
    patience: float = PATIENCE
    """Seconds that a reply to a poll may take, in all and without a byte."""
    options: Sequence[str] = field(default_factory=tuple)
    """Settings, as on the command line; later ones win."""


def training_of(case: Case) -> Training:
    """How the run of a row trains."""
    return Training(
        steps=len(case.good_bodies()),
        batch_size=case.batch_size,
        patience=case.patience,
        options=case.options,
    )


def configure(model: Path, output: Path, url: str, training: Training) -> TrainerConfig:
    settings: dict[str, Any] = {
        "atropos.url": url,
        "atropos.batch_size": training.batch_size,
        "atropos.max_body_bytes": MAX_BODY_BYTES,
        "atropos.read_timeout": training.patience,
        "atropos.ready_timeout": PATIENCE,
        "atropos.batch_timeout": PATIENCE,
        "model.path": model,
        "train.output_dir": output,
        "train.steps": training.steps,
        "train.device": "cpu",
        "train.mixed_precision": "no",
        "optimizer.learning_rate": 1e-3,
        "loss.name": "policy_gradient",
        "checkpoint.every": 100,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return load_config(None, [*words, *training.options], environment={})


def train_over_http(
    model: Path,
    output: Path,
    url: str,
    training: Training,
    *,
    on_step: Callable[[int], None] = lambda step: None,
) -> RunSummary:
    """Run the real loop against an API; `on_step` hears of every optimizer step."""
    config = configure(model, output, url, training)

    def on_row(row: dict[str, Any]) -> None:
        if row["kind"] == "step":
            on_step(row["step"])

    return build_trainer(
        config, source=ImpatientSource(config, step=lambda: 0, served_version=lambda: 0), on_row=on_row
    ).run()


def script_api(server: MisbehavingServer, answers: Sequence[Answer], **others: Answer) -> None:
    """Let a server answer polls with `answers`, then "no data", and every other route as the API does."""
    server.script("/", Answer(body=b'{"message":"AtroposLib API"}'))
    server.script("/register", Answer(body=b'{"uuid":1}'))
    server.script("/info", Answer(body=b'{"batch_size":4,"max_token_len":2048}'))
    server.script("/status", Answer(body=b'{"current_step":0,"queue_size":0}'))
    server.script("/batch", *answers, NO_DATA)
    for path, answer in others.items():
        server.script(f"/{path}", answer)


def push(url: str, groups: Sequence[str]) -> httpx.Response:
    """Send groups, as JSON text, as an environment does; whatever the API says comes back."""
    body = f"[{','.join(groups)}]".encode()
    return httpx.post(
        f"{url}/scored_data_list",
        content=body,
        headers={"Content-Type": "application/json"},
        timeout=PATIENCE,
    )


@contextmanager
def beside(work: Callable[[], None]) -> Iterator[None]:
    """Do something in a thread while the block runs; its failure is the block's."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised below, in the test's own thread
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(PATIENCE)
        if failures:
            raise failures[0]

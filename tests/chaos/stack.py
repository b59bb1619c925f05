"""A run with everything around it: Atropos API, recorded rollouts, inference server, trainers that die."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx

from atropos_client import AtroposClient, AtroposClientError
from atropos_client.journal import Journal
from local_stack.inference import Engine, EngineSettings
from schemas import ScoredGroup
from tests.atropos_client.environment_side import ACCEPTED, push_groups, register_environment
from tests.atropos_client.test_real_api import RealApi
from tests.chaos.deaths import KINDS, Death
from tests.chaos.trainer_run import run
from tests.forked import PROCESSES
from tests.trainer.batches import make_group

GROUPS_IN_A_BATCH = 2
GROUP_SIZE = 4
DEADLINE = 240.0
"""Seconds for one life of a trainer, on a slow machine that is busy with other things."""

STEPS_IN_A_LIFE = 12
"""At most so many steps that a trainer may do before it is killed from outside."""


class RecordingEngine(Engine):
    """Notes the checksum of every version that it is told to serve."""

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        self.served: dict[int, set[str]] = defaultdict(set)
        """Checksums of the weights by version."""

    async def reload_weights(self, directory: Path) -> None:
        """Load, and note."""
        digest = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
        await super().reload_weights(directory)
        self.served[int(directory.name.removeprefix("v"))].add(digest)


def recorded_groups(batches: int) -> list[ScoredGroup]:
    """The same rollouts each time."""
    generator = random.Random(0)
    return [
        ScoredGroup.model_validate(make_group(generator, size=GROUP_SIZE))
        for _ in range(batches * GROUPS_IN_A_BATCH)
    ]


class RecordedEnvironment:
    """Pushes recorded groups, all at once, when a trainer has come.

    The API forms batches out of what it holds when it is asked, and serves the newest first: only a single
    push gives the same batches in the same order each time.
    """

    def __init__(self, url: str, groups: list[ScoredGroup]) -> None:
        self._url = url
        self._groups = groups
        self._thread = threading.Thread(target=self._push, name="environment", daemon=True)
        self._thread.start()

    def _push(self) -> None:
        with AtroposClient(self._url) as client:
            while not self._registered(client):
                time.sleep(0.05)
        push_groups(self._url, self._groups)

    def _registered(self, client: AtroposClient) -> bool:
        try:
            if not client.info().registered:
                return False
            return register_environment(self._url, group_size=GROUP_SIZE)["status"] == ACCEPTED
        except (AtroposClientError, httpx.HTTPError):  # no trainer has come yet
            return False


@dataclass(frozen=True)
class Life:
    """How one trainer ended."""

    death: Death | None
    killed: bool
    seconds: float
    steps: int
    """Steps that its metrics file knew of in the end."""


class Stack:
    """An API and the trainer's settings; `live` starts one trainer after the other.

    `inference`: the server that is published to. None: nothing is published.
    """

    def __init__(
        self, output: Path, *, model: Path, api: str, steps: int, inference: str | None = None
    ) -> None:
        publishing = (
            ("disk", "--publish.servers", inference, "--publish.keep", "3") if inference else ("none",)
        )
        self.output = output
        self.log = output.with_name(f"{output.name}.log")
        self._words = [
            *("--model.path", str(model), "--train.output_dir", str(output)),
            *("--atropos.url", api, "--atropos.batch_size", str(GROUPS_IN_A_BATCH * GROUP_SIZE)),
            *("--atropos.max_token_length", "64", "--journal.shutdown_timeout", "20"),
            *("--publish.transport", *publishing),
            *("--train.steps", str(steps), "--train.device", "cpu", "--train.mixed_precision", "no"),
            *("--train.mismatch_alarm", "null", "--checkpoint.every", "3", "--logging.progress", "false"),
            *("--optimizer.learning_rate", "1e-3", "--optimizer.schedule", "cosine"),
            *("--loss.name", "policy_gradient", "--data.advantage_normalization", "global"),
        ]

    def start(self, *others: str, death: Death | None = None) -> BaseProcess:
        """Start a trainer, with further settings; whoever starts it has to end it."""
        process = PROCESSES.Process(target=run, args=([*self._words, *others], self.log, death))
        process.start()
        return process

    def wait_for(self, trainer: BaseProcess, *, steps: int) -> None:
        """Wait until the metrics file knows of so many steps, or the trainer has ended."""
        deadline = time.monotonic() + DEADLINE
        while self._rows() < steps and trainer.is_alive():
            assert time.monotonic() < deadline, self.log.read_text()[-6000:]
            trainer.join(0.02)

    def live(self, death: Death | None = None) -> Life:
        """Let a trainer live until it ends or dies."""
        started = time.monotonic()
        process = self.start(death=death)
        if death is not None and death.kind == "time":
            # On a fast machine the run must not be over before all kills have been.
            enough = self._rows() + STEPS_IN_A_LIFE
            while process.is_alive() and time.monotonic() < started + death.delay and self._rows() < enough:
                process.join(0.02)
            process.kill()
        process.join(DEADLINE)
        seconds = time.monotonic() - started
        code = process.exitcode
        if code is None:
            process.kill()
        assert code in (0, -9), f"the trainer ended with {code}, {death}:\n{self.log.read_text()[-6000:]}"
        return Life(death, killed=code == -9, seconds=seconds, steps=self._rows())

    def live_through(self, kills: int, seed: int, *, longest_life: float) -> list[Life]:
        """Kill trainers until `kills` have died, then let the last one finish."""
        generator = random.Random(seed)
        lives: list[Life] = []
        kinds = [KINDS[number % len(KINDS)] for number in range(kills)]
        generator.shuffle(kinds)
        for kind in kinds:
            lives.append(self.live(Death.draw(kind, generator, longest_life=longest_life)))
            if not lives[-1].killed:
                return lives
        return [*lives, self.live()]

    # What is left in the end.

    def checkpoint_files(self) -> dict[str, str]:
        """Checksums of the newest checkpoint's tensors."""
        newest = self._newest_checkpoint()
        return {
            str(path.relative_to(newest)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(newest.rglob("*.safetensors"))
        }

    def final_weights(self) -> bytes:
        """The finished model."""
        return (self.output / "final/model.safetensors").read_bytes()

    def state(self) -> dict[str, Any]:
        """The small part of the newest checkpoint."""
        state: dict[str, Any] = json.loads((self._newest_checkpoint() / "state.json").read_text())
        return state

    def ledger(self) -> list[tuple[Any, ...]]:
        """Every batch, without what the clock decides: when it came, and what was served at that moment."""
        with Journal.read_only(self.output / "journal") as journal:
            return [(e.number, e.size, e.sha256, e.outcome, e.step, e.reason) for e in journal.ledger()]

    def losses(self) -> list[tuple[int, int, float]]:
        """Step, batch and loss of every row, in order."""
        rows = [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]
        return [(row["step"], row["batch"], row["loss"]) for row in rows if row["kind"] == "step"]

    def leftovers(self) -> list[str]:
        """Directories that were begun and never finished."""
        return sorted(str(path.relative_to(self.output)) for path in self.output.glob("checkpoints/.*"))

    def steps(self) -> int:
        """Steps that the metrics file knows of."""
        return self._rows()

    def _rows(self) -> int:
        path = self.output / "metrics.jsonl"
        return path.read_text().count('"kind": "step"') if path.exists() else 0

    def _newest_checkpoint(self) -> Path:
        return max(self.output.glob("checkpoints/step-*"))


Start = Callable[..., Any]


def whole_stack(
    output: Path, *, model: Path, start_inference_server: Start, steps: int
) -> Iterator[tuple[Stack, RecordingEngine]]:
    """A stack with recorded rollouts for `steps` steps, not one more."""
    with RealApi() as api:
        server = start_inference_server(model, engine_class=RecordingEngine)
        RecordedEnvironment(api.url, recorded_groups(steps))
        yield Stack(output, model=model, api=api.url, inference=server.url, steps=steps), server.engine

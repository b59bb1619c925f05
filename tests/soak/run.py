"""One soak: everything started, faults and restarts until the trainer is done, and the account of it."""

from __future__ import annotations

import contextlib
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.atropos_client.misbehaving_server import eventually
from tests.atropos_client.test_real_api import RealApi
from tests.soak.environment import GROUP_SIZE, GROUPS_IN_A_BATCH, Environment
from tests.soak.faulty_proxy import FaultyProxy, Passage
from tests.soak.processes import Inference, Program, Sampler

FAULTY_SHARE: Final = 0.05
DEADLINE_FOR_A_BATCH: Final = 240.0
"""Seconds without a batch that only a hang takes."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long, and with what."""

    steps: int
    restarts: int
    """Of the API, and as many of the inference server."""
    publish_every: int
    checkpoint_every: int
    sample_every: float
    """Seconds between two looks at the processes."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of it."""

    plan: Plan
    exit_code: int | None
    seconds: float
    output: Path
    log: str
    """What the trainer wrote."""
    environment: Environment
    to_api: list[Passage]
    """Every request between trainer and API."""
    to_inference: list[Passage]
    sampler: Sampler
    restarts: dict[str, int]
    served: str | None
    """The version that the inference server serves in the end."""


def soak(model: Path, directory: Path, plan: Plan) -> Outcome:
    """Run one."""
    with contextlib.ExitStack() as stack:
        api = stack.enter_context(RealApi())
        inference = stack.enter_context(Inference(model, directory / "inference.log"))
        to_api = stack.enter_context(FaultyProxy(api.url, share=FAULTY_SHARE, seed=f"{plan.seed} api"))
        to_inference = stack.enter_context(
            FaultyProxy(inference.url, share=FAULTY_SHARE, seed=f"{plan.seed} inference")
        )
        environment = Environment(api.url, f"{plan.seed} rollouts")
        stack.callback(environment.close)
        output = directory / "run"
        words = ["trainer.cli", "run", *_settings(model, output, to_api.url, to_inference.url, plan)]
        started = time.monotonic()
        trainer = stack.enter_context(Program(words, directory / "trainer.log"))
        sampler = stack.enter_context(Sampler(trainer.pid, plan.sample_every))
        course = _Course(plan, api, inference, to_api, to_inference, environment)
        course.follow(trainer)
        seconds = time.monotonic() - started
        if trainer.exit_code() is not None:  # one that hangs may still ask
            course.close_the_books()
        return Outcome(
            plan=plan,
            exit_code=trainer.exit_code(),
            seconds=seconds,
            output=output,
            log=trainer.log(),
            environment=environment,
            to_api=to_api.passages(),
            to_inference=to_inference.passages(),
            sampler=sampler,
            restarts=course.restarts,
            served=inference.weight_version(),
        )


class _Course:
    """Supplies the API and restarts the parties as the run goes on."""

    def __init__(
        self,
        plan: Plan,
        api: RealApi,
        inference: Inference,
        to_api: FaultyProxy,
        to_inference: FaultyProxy,
        environment: Environment,
    ) -> None:
        self._api = api
        self._inference = inference
        self._to_api = to_api
        self._to_inference = to_inference
        self._environment = environment
        self._generator = random.Random(f"{plan.seed} restarts")
        self.restarts = {"api": 0, "inference": 0}
        # One after the other, evenly over the run but for its last tenth, each at some moment of its own.
        span = 0.9 * plan.steps / (2 * plan.restarts)
        self._due = [
            (int(span * (number + self._generator.uniform(0.4, 1.0))), ("api", "inference")[number % 2])
            for number in range(2 * plan.restarts)
        ]

    def follow(self, trainer: Program) -> None:
        """Until the trainer has ended, or no batch has been taken for too long."""
        taken, last = 0, time.monotonic()
        while trainer.exit_code() is None and time.monotonic() - last < DEADLINE_FOR_A_BATCH:
            if self._taken() != taken:
                taken, last = self._taken(), time.monotonic()
                self._to_api.arm()  # before the first batch, what fails ends a run: it was set up wrongly
                self._to_inference.arm()
            self._environment.supply(taken)
            if self._due and taken >= self._due[0][0]:
                self._restart(self._due.pop(0)[1])
            time.sleep(0.01)

    def close_the_books(self) -> None:
        """Ask the API what is left in it, once the trainer has ended."""
        eventually(lambda: self._to_api.idle)  # a request of the ended trainer may be under way
        self._environment.supply_nothing(self._taken())
        self._environment.hear()
        self._environment.drain()

    def _taken(self) -> int:
        return self._to_api.taken

    def _restart(self, party: str) -> None:
        time.sleep(self._generator.uniform(0.0, 0.3))
        if party == "api":
            self._environment.hear()
            self._api.kill()
            time.sleep(0.2)  # what was read before it died is noted
            self._environment.supply_nothing(self._taken())
            self._environment.forget()
            time.sleep(self._generator.uniform(0.0, 1.0))
            self._api.start()
        else:
            self._inference.kill()
            time.sleep(self._generator.uniform(0.0, 1.0))
            self._inference.start()
        self.restarts[party] += 1


def _settings(model: Path, output: Path, api: str, inference: str, plan: Plan) -> list[str]:
    return [
        *("--model.path", str(model), "--train.output_dir", str(output)),
        *("--atropos.url", api, "--atropos.batch_size", str(GROUPS_IN_A_BATCH * GROUP_SIZE)),
        *("--atropos.max_token_length", "64", "--train.steps", str(plan.steps)),
        *("--train.device", "cpu", "--train.mixed_precision", "no", "--train.mismatch_alarm", "null"),
        *("--optimizer.learning_rate", "1e-5", "--loss.name", "policy_gradient"),
        *("--data.advantage_normalization", "global", "--logging.progress", "false"),
        *("--publish.transport", "disk", "--publish.servers", inference),
        *("--publish.every", str(plan.publish_every), "--publish.watch_interval", "1"),
        *("--checkpoint.every", str(plan.checkpoint_every)),
    ]

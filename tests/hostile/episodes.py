"""Rows of the table: what happens around a run, most of it on the real API server."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable

import pytest

from atropos_client import AtroposClient, parse_batch
from schemas import Registration
from tests.atropos_client.misbehaving_server import Answer, MisbehavingServer, eventually
from tests.atropos_client.test_real_api import RealApi
from tests.hostile.case import AFTER, BASE, NEIGHBOUR, EpisodeCase, Group, Stage
from tests.hostile.harness import PATIENCE, beside, push, script_api
from trainer import RunSummary

FIRST = [NEIGHBOUR, BASE]
STOLEN = [AFTER[1], BASE]
YEARS = 10 * 365 * 24 * 3600.0


def register(url: str, batch_size: int) -> None:
    """Wipe the API and register with it, so that groups can be pushed before the run starts."""
    with AtroposClient(url) as client:
        client.reset_data()
        client.register(Registration(batch_size=batch_size, max_token_len=2048, num_steps=10))


def push_groups(url: str, groups: list[Group]) -> None:
    push(url, [json.dumps(group) for group in groups]).raise_for_status()


def push_when_registered(url: str, groups: list[Group]) -> None:
    """As an environment that starts over: groups that come before the trainer would be lost."""
    with AtroposClient(url) as client:
        eventually(lambda: client.info().registered, PATIENCE)
    push_groups(url, groups)


def with_an_event_after_the_first_step(stage: Stage, url: str, event: Callable[[], None]) -> RunSummary:
    """Train on FIRST, then let `event` happen and push AFTER."""
    first_step_done = threading.Event()

    def happen() -> None:
        assert first_step_done.wait(PATIENCE)
        event()
        push_when_registered(url, AFTER)

    push_when_registered(url, FIRST)
    with beside(happen):
        return stage.train(url, on_step=lambda step: first_step_done.set())


def reset_in_the_middle(stage: Stage) -> RunSummary:
    register(stage.api.url, 4)
    with AtroposClient(stage.api.url) as client:
        return with_an_event_after_the_first_step(stage, stage.api.url, client.reset_data)


def restart_in_the_middle(stage: Stage) -> RunSummary:
    with RealApi() as api:
        register(api.url, 4)

        def restart() -> None:
            api.kill()
            api.start()

        return with_an_event_after_the_first_step(stage, api.url, restart)


def another_trainer_was_first(stage: Stage) -> RunSummary:
    register(stage.api.url, 2)
    push_groups(stage.api.url, AFTER[:1])
    push_groups(stage.api.url, [NEIGHBOUR])
    return stage.train(stage.api.url)


def another_trainer_takes_a_batch(stage: Stage) -> RunSummary:
    register(stage.api.url, 4)
    for groups in (AFTER, FIRST, STOLEN):
        push_groups(stage.api.url, groups)
    with AtroposClient(stage.api.url) as other:
        other.register(Registration(batch_size=2, max_token_len=16, num_steps=1))
        assert parse_batch(other.fetch_batch()).groups[0].tokens == STOLEN[0]["tokens"]
    return stage.train(stage.api.url)


def clock_jumps(stage: Stage) -> RunSummary:
    register(stage.api.url, 4)
    push_groups(stage.api.url, AFTER)
    push_groups(stage.api.url, FIRST)
    now = time.time
    offsets = itertools.cycle([0.0, YEARS, -YEARS])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: now() + next(offsets))
        return stage.train(stage.api.url)


def redirect_to_another_host(stage: Stage) -> RunSummary:
    with MisbehavingServer() as elsewhere:
        elsewhere.script("/batch", batch(STOLEN))
        away = Answer(status=307, headers={"Location": f"{elsewhere.url}/batch"})
        script_api(stage.server, [batch(FIRST), away, batch(AFTER)])
        stage.server.seen.clear()
        summary = stage.train(stage.server.url)
        polls = [seen for seen in stage.server.seen if seen.path == "/batch"]
        assert all(seen.headers["authorization"] == "Bearer hunter2" for seen in polls)
        assert elsewhere.seen == []
    return summary


def batch(groups: list[Group]) -> Answer:
    return Answer(body=json.dumps({"batch": groups}).encode())


EPISODE_CASES: list[EpisodeCase] = [
    EpisodeCase(
        name="reset_data in the middle",
        sent="the API forgets queue and registration; the next poll gets status 500",
        by="real API",
        outcome="possibly lost",
        says="status 500",
        good_part=FIRST,
        play=reset_in_the_middle,
    ),
    EpisodeCase(
        name="a restart of the API in the middle",
        sent="SIGKILL, then a new process that knows nobody",
        by="real API",
        outcome="trained",
        good_part=FIRST,
        play=restart_in_the_middle,
        may_cost_a_poll=True,
    ),
    EpisodeCase(
        name="a second trainer that registered first",
        sent="with batches of 2; the API keeps that size, and a warning says so",
        by="real API",
        outcome="trained",
        good_part=[NEIGHBOUR],
        after=AFTER[:1],
        play=another_trainer_was_first,
    ),
    EpisodeCase(
        name="a second trainer that takes a batch",
        sent="registered beside us; the others are ours",
        by="real API",
        outcome="trained",
        good_part=FIRST,
        play=another_trainer_takes_a_batch,
    ),
    EpisodeCase(
        name="a clock that jumps",
        sent="the wall clock moves by ten years back and forth, at every look",
        by="this machine",
        outcome="trained",
        good_part=FIRST,
        play=clock_jumps,
    ),
    EpisodeCase(
        name="a redirect to another host",
        sent="status 307 in the middle of a run with a token; the other host never hears of us",
        by="server",
        outcome="trained",
        good_part=FIRST,
        options=("--atropos.token", "hunter2"),
        play=redirect_to_another_host,
    ),
]

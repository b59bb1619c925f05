"""Client and fetching against the real Atropos API server, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from atropos_client import AtroposClient, ServerError, ask_environments, parse_batch
from atropos_client.fetcher import Fetcher
from atropos_client.journal import Journal
from atropos_client.waiting import EnvironmentFacts
from schemas import Registration, ScoredGroup
from tests.atropos_client.conftest import Ask
from tests.atropos_client.environment_side import ACCEPTED, push_groups, register_environment
from tests.atropos_client.in_thread import ThreadFetcher
from tests.atropos_client.misbehaving_server import eventually
from tests.atropos_client.test_fetcher import settings_for
from tests.ports import free_port

pytestmark = pytest.mark.slow

REGISTRATION = Registration(batch_size=4, max_token_len=4096, num_steps=10, wandb_group="g", starting_step=5)
PATIENCE = 60.0  # seconds; only ends a hang


def group(token: int, *, length: int = 3, env_id: int | None = 0, **more: Any) -> ScoredGroup:
    """A group of two sequences whose tokens say which group it is."""
    tokens = [[token] * length, [token] * length]
    masks = [[-100, *row[1:]] for row in tokens]
    logprobs = [[1.0] + [-0.5] * (length - 1)] * 2
    return ScoredGroup(
        tokens=tokens, masks=masks, scores=[1.0, 0.0], inference_logprobs=logprobs, env_id=env_id, **more
    )


class RealApi:
    """The real server on a loopback port; can be killed and started again at the same address."""

    def __init__(self) -> None:
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__

    def start(self) -> None:
        command = [sys.executable, "-m", "uvicorn", "atroposlib.api.server:app", "--host", "127.0.0.1"]
        command += ["--port", str(self._port), "--log-level", "warning"]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        with AtroposClient(self.url) as client:
            client.wait_until_ready(PATIENCE)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._log.close()


@pytest.fixture(scope="module")
def shared_api() -> Iterator[RealApi]:
    with RealApi() as running:
        yield running


@pytest.fixture
def api(shared_api: RealApi) -> RealApi:
    """The module's server, with nothing in it."""
    with AtroposClient(shared_api.url) as client:
        client.reset_data()
        client.register(REGISTRATION)
    return shared_api


def test_the_whole_life_of_a_batch(api: RealApi, ask: Ask) -> None:
    ask(api.url, "register", REGISTRATION)
    early = register_environment(api.url)
    assert early["status"] != ACCEPTED, "environments must wait for the trainer's first poll"
    assert parse_batch(ask(api.url, "fetch_batch")).state == "waiting"

    environment = register_environment(api.url)
    assert environment["status"] == ACCEPTED
    assert [environment[name] for name in ("env_id", "starting_step", "num_steps")] == [0, 5, 10]
    assert ask(api.url, "environment_status", 0).env_weight == 1.0
    assert ask(api.url, "info").batch_size == 4

    first, second = group(11), group(22, length=1_000, overrides=[{}, {"set_advantage_to_zero": True}])
    push_groups(api.url, [first, second])
    assert ask(api.url, "latest_example") == second
    assert ask(api.url, "status").queue_size == 2

    reply = parse_batch(ask(api.url, "fetch_batch"))
    assert (reply.groups, reply.rejected) == ([first, second], [])
    assert ask(api.url, "status").current_step == 6
    assert parse_batch(ask(api.url, "fetch_batch")).state == "waiting"


def test_the_status_of_an_unknown_environment_is_a_server_error_at_once(api: RealApi) -> None:
    with AtroposClient(api.url) as client, pytest.raises(ServerError, match="500"):
        client.environment_status(7)


@pytest.fixture
def fetching(tmp_path: Path) -> Callable[[str], Fetcher]:
    """Make a fetcher of the API at an address; to be used as a context manager."""

    def make(url: str) -> Fetcher:
        settings = settings_for(url, registration=REGISTRATION, longest_failure_pause=0.2)
        return ThreadFetcher(Journal.open(tmp_path / "journal"), settings, after=0)

    return make


def tokens_of(fetcher: Fetcher) -> list[int]:
    """The first token of each group of the next batch."""
    return [group.tokens[0][0] for group in fetcher.get(PATIENCE).reply.groups]


@pytest.mark.parametrize("after", ["a start", "a reset"])
def test_one_registers_although_a_group_was_pushed_before(
    after: str, fetching: Callable[[str], Fetcher], caplog: pytest.LogCaptureFixture
) -> None:
    with RealApi() as api, AtroposClient(api.url) as client:
        if after == "a reset":
            client.register(REGISTRATION)
            client.reset_data()
        push_groups(api.url, [group(1)])  # the server ignores every registration from here on
        client.register(REGISTRATION)
        assert not client.info().registered
        with fetching(api.url) as fetcher:
            eventually(lambda: register_environment(api.url)["status"] == ACCEPTED)
            push_groups(api.url, [group(2), group(3)])
            assert tokens_of(fetcher) == [2, 3]
            assert (fetcher.counters.re_registrations, fetcher.counters.possibly_lost) == (0, 0)
    assert caplog.text.count("ignores registrations") == 1
    assert "earlier registration" not in caplog.text


def test_what_the_api_knows_of_its_environments_is_asked(api: RealApi) -> None:
    with AtroposClient(api.url) as client:
        client.fetch_batch()
        nobody = ask_environments(client)
        assert nobody is not None
        assert (nobody.registered, nobody.without_groups, nobody.reserved) == (0, (), False)
        register_environment(api.url)
        register_environment(api.url, min_batch_allocation=0.5)
        push_groups(api.url, [group(1)])
        assert ask_environments(client) == EnvironmentFacts(
            registered=2, without_groups=(1,), largest_group=2, latest_group=2, reserved=True
        )


def test_groups_that_never_fill_a_batch_are_named_before_the_heartbeat(
    api: RealApi,
    fetching: Callable[[str], Fetcher],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("atropos_client.fetcher._lateness._SOON", 0.05)
    three = ScoredGroup(tokens=[[1, 2]] * 3, masks=[[-100, 2]] * 3, scores=[1.0, 0.0, 0.0])
    with fetching(api.url) as fetcher:
        register_environment(api.url)
        push_groups(api.url, [three, three])
        eventually(lambda: "groups of 3 sequences never make a batch of exactly 4" in caplog.text)
        assert "groups of 3 sequences never make" in fetcher.explain_wait()
    assert caplog.text.count("no batch will come") == 1

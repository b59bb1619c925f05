"""Publishing in the background, to several servers, through failures and restarts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.inference_stand_in import BASE, STEP, Policy, StandIn, Weights, serving
from tests.trainer.publishing import publishing as publishing_once
from trainer.publish import (
    PublishFailed,
    ServerFailure,
    VerificationFailed,
    fleet,
)
from trainer.publish.errors import Phase
from trainer.publish.fleet import may_help

NEXT = (0.7, 0.1)

publishing = partial(publishing_once, on_failure="retry_until")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(fleet, "LONGEST_WAIT", 0.02)


def times(number: int, answer: tuple[int, Any]) -> Callable[[], tuple[int, Any] | None]:
    """A fault that goes away."""
    left = number

    def fault() -> tuple[int, Any] | None:
        nonlocal left
        left -= 1
        return answer if left >= 0 else None

    return fault


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def restart(server: StandIn) -> None:
    """What a restarted server looks like from outside."""
    server.weights, server.label, server.paused = BASE, "default", False


def test_training_goes_on_while_a_version_is_written_and_loaded(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    loading, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        loading.set()
        assert go_on.wait(10)

    with publishing(policy, tmp_path, server) as publisher:
        publisher.start(0)
        publisher.settle()
        policy.weights = STEP
        server.faults["/collective_rpc"] = slow
        publisher.begin(1)
        assert loading.wait(10)
        policy.weights = NEXT  # the next step, while version 1 is on its way
        assert publisher.served_version == 0
        assert publisher.loaded_version is None
        go_on.set()
        publisher.settle()
        assert publisher.served_version == publisher.loaded_version == 1
        report = publisher.take_reports()[-1]
    assert server.weights == STEP
    assert report.version == 1
    assert report.verified
    assert report.total_seconds > report.capture_seconds


def test_there_is_never_more_than_one_publish_under_way_and_none_is_left_out(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    with publishing(policy, tmp_path, server) as publisher:
        publisher.start(0)
        for version, weights in enumerate((STEP, NEXT, BASE), start=1):
            policy.weights = weights
            publisher.begin(version)
        publisher.settle()
        assert [report.version for report in publisher.take_reports()] == [0, 1, 2, 3]
        assert publisher.take_reports() == []
    assert [call for call in server.paths() if call in ("/pause", "/resume")] == ["/pause", "/resume"] * 3
    assert server.label == "3"


def test_without_overlap_the_version_is_proven_when_begin_returns(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    with publishing(policy, tmp_path, server, overlap=False) as publisher:
        publisher.start(0)
        policy.weights = STEP
        publisher.begin(1)
        assert publisher.served_version == 1


def test_a_failure_in_the_background_comes_out_in_the_training_thread(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    with publishing(policy, tmp_path, server, on_failure="abort") as publisher:
        publisher.start(0)
        server.faults["/collective_rpc"] = (500, {"error": "no memory"})
        policy.weights = STEP
        publisher.begin(1)

        def tended() -> bool:
            publisher.tend(1)
            return False

        with pytest.raises(ServerFailure, match=r"load failed.*no memory"):
            eventually(tended)
        assert publisher.served_version == 0
    assert not server.paused


def test_a_server_that_fails_for_a_while_gets_the_version_in_the_end(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    with publishing(policy, tmp_path, server) as publisher:
        publisher.start(0)
        server.faults["/collective_rpc"] = times(2, (500, {"error": "starting"}))
        policy.weights = STEP
        report = publisher.publish(1)
    assert report.attempts == 3
    assert server.weights == STEP


def test_a_server_that_dies_in_the_middle_of_a_publish_and_is_restarted_gets_the_version(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    def die() -> tuple[int, Any]:
        restart(server)
        server.faults = {"/pause": times(3, (503, {})), "/resume": times(3, (503, {}))}
        return 500, {"error": "engine dead"}

    with publishing(policy, tmp_path, server) as publisher:
        publisher.start(0)
        server.faults["/collective_rpc"] = die
        policy.weights = STEP
        publisher.begin(1)
        publisher.settle()
    assert (server.weights, server.label) == (STEP, "1")
    assert not server.paused


def test_what_the_server_does_not_understand_is_not_repeated(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    with publishing(policy, tmp_path, server) as publisher:
        publisher.start(0)
        publisher.settle()
        server.calls.clear()
        server.faults["/pause"] = (404, {"detail": "Not Found"})
        with pytest.raises(ServerFailure, match=r"pause failed.*404"):
            publisher.publish(1)
    assert server.paths().count("/pause") == 1


def test_a_server_that_was_down_and_is_restarted_once_more_after_loading_is_not_given_up(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    def loads_in_vain_once(old: Weights, new: Weights) -> Weights:
        server.load = lambda old, new: new
        return old

    with publishing(policy, tmp_path, server) as publisher:
        publisher.start(0)
        server.faults["/collective_rpc"] = times(2, (500, {"error": "starting"}))
        server.load = loads_in_vain_once
        policy.weights = STEP
        report = publisher.publish(1)
    assert report.attempts == 4
    assert server.weights == STEP


def test_a_server_that_never_serves_what_it_loads_ends_the_run_after_three_attempts(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    with publishing(policy, tmp_path, server) as publisher:
        publisher.start(0)
        publisher.settle()
        server.calls.clear()
        server.load = lambda old, new: old
        policy.weights = STEP
        with pytest.raises(VerificationFailed):
            publisher.publish(1)
    assert server.paths().count("/collective_rpc") == 3


def test_the_retries_end_when_their_time_is_over(policy: Policy, server: StandIn, tmp_path: Path) -> None:
    with publishing(policy, tmp_path, server, retry_seconds=0.3) as publisher:
        publisher.start(0)
        server.faults["/collective_rpc"] = (500, {"error": "for ever"})
        with pytest.raises(ServerFailure, match=r"load failed.*for ever"):
            publisher.publish(1)
    assert server.paths().count("/collective_rpc") > 2


def test_a_request_to_stop_ends_the_retries(policy: Policy, server: StandIn, tmp_path: Path) -> None:
    stop = threading.Event()
    with publishing(policy, tmp_path, server, stop_requested=stop.is_set) as publisher:
        publisher.start(0)
        server.faults["/collective_rpc"] = (500, {"error": "for ever"})
        publisher.begin(1)
        threading.Timer(0.2, stop.set).start()
        started = time.monotonic()
        with pytest.raises(ServerFailure, match=r"load failed.*for ever"):
            publisher.settle()
        assert time.monotonic() - started < 10


def test_at_the_start_nothing_is_repeated(policy: Policy, server: StandIn, tmp_path: Path) -> None:
    server.weights = NEXT
    server.faults["/collective_rpc"] = (500, {"error": "no such directory"})
    with publishing(policy, tmp_path, server) as publisher, pytest.raises(ServerFailure, match="load failed"):
        publisher.start(0)
    assert server.paths().count("/collective_rpc") == 1


def test_the_run_goes_on_without_a_lost_server_and_takes_it_back_with_the_current_version(
    policy: Policy, tmp_path: Path
) -> None:
    servers = StandIn(BASE), StandIn(BASE)
    good, bad = servers
    options: dict[str, Any] = {"on_failure": "continue_without", "retry_seconds": 0.1, "watch_interval": 0.05}
    with serving(*servers), publishing(policy, tmp_path, *servers, **options) as publisher:
        publisher.start(0)
        publisher.settle()
        bad.faults = {path: lambda: (500, {"error": "gone"}) for path in ("/pause", "/weight_info")}
        policy.weights = STEP
        report = publisher.publish(1)
        assert [outcome.server for outcome in report.servers] == [good.url]
        assert [outcome.server for outcome in report.lost] == [bad.url]
        assert report.metrics()["publish/servers_lost"] == 1
        assert "publish/version_lag" not in report.metrics(), "what the lost one serves is not known"
        assert publisher.loaded_version == 1
        policy.weights = NEXT
        started = time.monotonic()
        assert publisher.publish(2).attempts == 1, "a lost server holds nobody up"
        assert time.monotonic() - started < 5
        bad.faults = {}
        eventually(lambda: bad.label == "2")
        assert bad.weights == NEXT
        policy.weights = STEP
        eventually(lambda: not publisher.publish(3).lost)
        assert bad.weights == STEP


def test_without_any_server_left_even_continue_without_ends(policy: Policy, tmp_path: Path) -> None:
    servers = StandIn(BASE), StandIn(BASE)
    options: dict[str, Any] = {"on_failure": "continue_without", "retry_seconds": 0.1}
    with serving(*servers), publishing(policy, tmp_path, *servers, **options) as publisher:
        publisher.start(0)
        for server in servers:
            server.faults["/pause"] = (500, {"error": "gone"})
        with pytest.raises(PublishFailed, match="2 of 2"):
            publisher.publish(1)


def test_a_server_restarted_between_publishes_gets_the_current_version_again(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    with publishing(policy, tmp_path, server, watch_interval=0.05) as publisher:
        publisher.start(0)
        policy.weights = STEP
        publisher.publish(1)
        policy.weights = NEXT  # a step that is not published yet
        restart(server)
        eventually(lambda: server.label == "1")
        assert server.weights == STEP
        assert publisher.served_version == 1


def test_a_server_restarted_before_the_first_publish_gets_the_first_version_again(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    policy.weights = server.weights = STEP
    with publishing(policy, tmp_path, server, watch_interval=0.05) as publisher:
        assert publisher.start(4).already_served
        restart(server)
        eventually(lambda: server.label == "4")
        assert server.weights == STEP


def test_a_server_without_labels_gets_the_version_again_after_it_was_away(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    labels = ("/weight_info", "/update_weight_version")
    server.faults = {path: lambda: (404, {"detail": "Not Found"}) for path in labels}
    with publishing(policy, tmp_path, server, watch_interval=0.05) as publisher:
        publisher.start(0)
        policy.weights = STEP
        publisher.publish(1)
        server.faults["/weight_info"] = (500, {})
        restart(server)
        time.sleep(0.3)
        server.faults["/weight_info"] = (404, {"detail": "Not Found"})
        eventually(lambda: server.weights == STEP)


@pytest.mark.parametrize(
    ("status", "helps"), [(None, True), (500, True), (503, True), (429, True), (200, True), (400, False)]
)
def test_what_may_help(status: int | None, helps: bool) -> None:
    error = ServerFailure("x", server="http://s", phase=Phase.READY, status=status)
    assert may_help([error], verification_failures=0) is helps
    assert not may_help([error], verification_failures=3)

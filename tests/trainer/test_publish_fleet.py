"""Publishing in the background, to several servers, through failures and restarts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.inference_stand_in import BASE, STEP, Answer, Policy, StandIn, Weights, serving
from tests.trainer.publishing import eventually, publishing
from trainer.publish import Phase, Publisher, PublishFailed, ServerFailure, VerificationFailed, fleet
from trainer.publish.fleet import may_help

NEXT = (0.7, 0.1)
WATCHING = pytest.mark.parametrize("options", [{"watch_interval": 0.05}])
ONCE = pytest.mark.parametrize("options", [{"on_failure": "abort"}])


@pytest.fixture
def options() -> dict[str, Any]:
    return {"on_failure": "retry_until"}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(fleet, "LONGEST_WAIT", 0.02)


def times(number: int, answer: Answer) -> Callable[[], Answer | None]:
    """A fault that goes away."""
    answers = iter([answer] * number)
    return lambda: next(answers, None)


def restart(server: StandIn) -> None:
    """What a restarted server looks like from outside."""
    server.weights, server.label, server.paused = BASE, "default", False


def test_training_goes_on_while_a_version_is_written_and_loaded(
    publisher: Publisher, policy: Policy, server: StandIn
) -> None:
    loading, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        loading.set()
        assert go_on.wait(10)

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
    assert (report.version, report.verified) == (1, True)
    assert report.total_seconds > report.capture_seconds


def test_there_is_never_more_than_one_publish_under_way_and_none_is_left_out(
    publisher: Publisher, policy: Policy, server: StandIn
) -> None:
    for version, weights in enumerate((STEP, NEXT, BASE), start=1):
        policy.weights = weights
        publisher.begin(version)
    publisher.settle()
    assert [report.version for report in publisher.take_reports()] == [0, 1, 2, 3]
    assert publisher.take_reports() == []
    assert [call for call in server.paths() if call in ("/pause", "/resume")] == ["/pause", "/resume"] * 3
    assert server.label == "3"


@pytest.mark.parametrize("options", [{"overlap": False}])
def test_without_overlap_the_version_is_proven_when_begin_returns(
    publisher: Publisher, policy: Policy
) -> None:
    policy.weights = STEP
    publisher.begin(1)
    assert publisher.served_version == 1


@ONCE
def test_a_failure_in_the_background_comes_out_in_the_training_thread(
    publisher: Publisher, server: StandIn
) -> None:
    server.faults["/collective_rpc"] = (500, {"error": "no memory"})
    publisher.begin(1)

    def tended() -> bool:
        publisher.tend(1)
        return False

    with pytest.raises(ServerFailure, match=r"load failed.*no memory"):
        eventually(tended)
    assert publisher.served_version == 0
    assert not server.paused


def test_a_server_that_dies_in_the_middle_of_a_publish_and_is_restarted_gets_the_version(
    publisher: Publisher, policy: Policy, server: StandIn
) -> None:
    def die() -> Answer:
        restart(server)
        server.faults = {"/pause": times(3, (503, {})), "/resume": times(3, (503, {}))}
        return 500, {"error": "engine dead"}

    server.faults["/collective_rpc"] = die
    policy.weights = STEP
    publisher.begin(1)
    publisher.settle()
    assert (server.weights, server.label, server.paused) == (STEP, "1", False)


def test_what_the_server_does_not_understand_is_not_repeated(publisher: Publisher, server: StandIn) -> None:
    server.faults["/pause"] = (404, {"detail": "Not Found"})
    with pytest.raises(ServerFailure, match=r"pause failed.*404"):
        publisher.publish(1)
    assert server.paths().count("/pause") == 1


def test_a_server_that_was_down_and_is_restarted_once_more_after_loading_is_not_given_up(
    publisher: Publisher, policy: Policy, server: StandIn
) -> None:
    def loads_in_vain_once(old: Weights, new: Weights) -> Weights:
        server.load = lambda old, new: new
        return old

    server.faults["/collective_rpc"] = times(2, (500, {"error": "starting"}))
    server.load = loads_in_vain_once
    policy.weights = STEP
    assert publisher.publish(1).attempts == 4
    assert server.weights == STEP


def test_a_server_that_never_serves_what_it_loads_ends_the_run_after_three_attempts(
    publisher: Publisher, policy: Policy, server: StandIn
) -> None:
    server.load = lambda old, new: old
    policy.weights = STEP
    with pytest.raises(VerificationFailed):
        publisher.publish(1)
    assert server.paths().count("/collective_rpc") == 3


@pytest.mark.parametrize("options", [{"on_failure": "retry_until", "retry_seconds": 0.3}])
def test_the_retries_end_when_their_time_is_over(publisher: Publisher, server: StandIn) -> None:
    server.faults["/collective_rpc"] = (500, {"error": "for ever"})
    with pytest.raises(ServerFailure, match=r"load failed.*for ever"):
        publisher.publish(1)
    assert server.paths().count("/collective_rpc") > 2


def test_a_request_to_stop_ends_the_retries(policy: Policy, server: StandIn, tmp_path: Path) -> None:
    stop = threading.Event()
    options: dict[str, Any] = {"on_failure": "retry_until", "stop_requested": stop.is_set}
    with publishing(policy, tmp_path, server, **options) as publisher:
        publisher.start(0)
        server.faults["/collective_rpc"] = (500, {"error": "for ever"})
        publisher.begin(1)
        threading.Timer(0.2, stop.set).start()
        with pytest.raises(ServerFailure, match=r"load failed.*for ever"):  # retry_seconds are 600
            publisher.settle()


def test_at_the_start_nothing_is_repeated(policy: Policy, server: StandIn, tmp_path: Path) -> None:
    server.weights = NEXT
    server.faults["/collective_rpc"] = (500, {"error": "no such directory"})
    with (
        publishing(policy, tmp_path, server, on_failure="retry_until") as publisher,
        pytest.raises(ServerFailure, match="load failed"),
    ):
        publisher.start(0)
    assert server.paths().count("/collective_rpc") == 1


def test_the_run_goes_on_without_a_lost_server_and_takes_it_back_with_the_current_version(
    policy: Policy, tmp_path: Path
) -> None:
    servers = good, bad = StandIn(BASE), StandIn(BASE)
    options: dict[str, Any] = {"on_failure": "continue_without", "retry_seconds": 0.1, "watch_interval": 0.05}
    with serving(*servers), publishing(policy, tmp_path, *servers, **options) as publisher:
        publisher.start(0)
        publisher.settle()
        bad.faults = {path: (500, {"error": "gone"}) for path in ("/pause", "/weight_info")}
        policy.weights = STEP
        report = publisher.publish(1)
        assert [outcome.server for outcome in report.servers] == [good.url]
        assert [outcome.server for outcome in report.lost] == [bad.url]
        assert report.metrics()["publish/servers_lost"] == 1
        assert "publish/version_lag" not in report.metrics(), "what the lost one serves is not known"
        assert publisher.loaded_version == 1
        policy.weights = NEXT
        assert publisher.publish(2).attempts == 1, "a lost server holds nobody up"
        bad.faults = {}
        eventually(lambda: bad.label == "2")
        assert bad.weights == NEXT
        policy.weights = STEP
        eventually(lambda: not publisher.publish(3).lost)
        assert bad.weights == STEP
        for server in servers:
            server.faults["/pause"] = (500, {"error": "gone"})
        with pytest.raises(PublishFailed, match="2 of 2"):  # without any server left even this policy ends
            publisher.publish(4)


@WATCHING
def test_a_server_restarted_between_publishes_gets_the_current_version_again(
    publisher: Publisher, policy: Policy, server: StandIn
) -> None:
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


@WATCHING
def test_a_server_without_labels_gets_the_version_again_after_it_was_away(
    publisher: Publisher, policy: Policy, server: StandIn
) -> None:
    no_route = (404, {"detail": "Not Found"})
    server.faults = dict.fromkeys(("/weight_info", "/update_weight_version"), no_route)
    policy.weights = STEP
    publisher.publish(1)
    server.calls.clear()
    server.faults["/weight_info"] = (500, {})
    restart(server)
    eventually(lambda: server.paths().count("/weight_info") > 1)
    server.faults["/weight_info"] = no_route
    eventually(lambda: server.weights == STEP)


@pytest.mark.parametrize(
    ("status", "helps"), [(None, True), (500, True), (503, True), (429, True), (200, True), (400, False)]
)
def test_what_may_help(status: int | None, helps: bool) -> None:
    error = ServerFailure("x", server="http://s", phase=Phase.READY, status=status)
    assert may_help([error], verification_failures=0) is helps
    assert not may_help([error], verification_failures=3)

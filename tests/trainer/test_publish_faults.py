"""Publishing against servers that misbehave in every phase."""

from __future__ import annotations

import pickle
import random
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.inference_stand_in import BASE, PROBES, STEP, Answer, Policy, StandIn, Weights, serving
from tests.trainer.publishing import publishing
from trainer.config import PublishSettings
from trainer.errors import ConfigurationError, TrainerError
from trainer.publish import (
    DiskTransport,
    Phase,
    PhaseDeadlineExceeded,
    Publisher,
    PublishFailed,
    ServerFailure,
    StagingFailed,
    Verdict,
    VerificationFailed,
    VllmRoutes,
)

ORDER = ["/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/resume"]


def test_a_publish_calls_the_routes_in_order_and_proves_the_new_weights(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    with publishing(policy, tmp_path, server) as publisher:
        assert publisher.served_version is None
        assert publisher.start(0).already_served
        assert publisher.served_version == 0
        server.calls.clear()
        policy.weights = STEP
        report = publisher.publish(1)
    assert server.paths() == [*ORDER, "/v1/completions", "/weight_info"]
    assert server.calls[0] == "POST /pause?mode=keep"
    assert server.weights == STEP
    assert server.label == "1"
    assert publisher.served_version == 1
    assert report.verified
    assert not report.already_served
    assert report.metrics()["publish/mean_difference"] < 1e-9
    assert report.metrics()["publish/fraction_arrived"] == pytest.approx(1.0)
    assert "version 1 published" in report.describe()


def test_a_server_with_other_weights_that_a_dead_trainer_left_paused_is_resumed_and_gets_ours_at_the_start(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    Policy(STEP).write(tmp_path / "v000007", STEP)  # an earlier run's, under the same number
    server.weights = (0.0, 0.0)
    server.paused = True
    with publishing(policy, tmp_path, server) as publisher:
        report = publisher.start(7)
    assert not report.already_served
    assert not server.paused
    assert (server.weights, server.label) == (BASE, "7")
    assert publisher.served_version == 7


def test_without_verification_the_start_publishes_and_nothing_is_scored(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    with publishing(policy, tmp_path, server, verify=False) as publisher:
        report = publisher.start(0)
    assert not report.verified
    assert "/v1/completions" not in server.paths()
    assert "/collective_rpc" in server.paths()
    assert publisher.served_version == 0


def test_staleness_below_the_servers_precision_is_caught_once_it_has_added_up(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    """A bfloat16 server whose numbers are noisy and whose weights never change."""
    policy.dtype = "bfloat16"
    generator = random.Random(0)
    server.noise = lambda: generator.gauss(0.0, 0.02)
    server.load = lambda old, new: old
    with publishing(policy, tmp_path, server, tolerance=0.25) as publisher:
        publisher.start(0)
        for version in range(1, 60):
            policy.weights = (BASE[0] + 0.005 * version, BASE[1])
            try:
                report = publisher.publish(version)
            except VerificationFailed as error:
                comparison = error.comparison
                break
            assert report.metrics()["publish/distinguishable"] == 0.0
    assert 2 < version < 59
    assert comparison is not None
    assert comparison.verdict is Verdict.STALE
    assert comparison.mean_difference < 0.25  # the tolerance alone would not have seen it


@pytest.mark.parametrize("options", [{"load_timeout": 1.0}])
def test_a_hang_ends_at_its_phases_deadline_and_names_the_phase(
    publisher: Publisher, server: StandIn
) -> None:
    server.faults["/collective_rpc"] = server.hang
    with pytest.raises(PhaseDeadlineExceeded, match="1 s") as caught:
        publisher.publish(1)
    error = caught.value
    assert isinstance(error, TimeoutError)
    assert (error.phase, error.server, error.version) == (Phase.LOAD, server.url, 1)
    assert "/resume" in server.paths()


def require_phase(error: ServerFailure, phase: Phase, status: int) -> None:
    assert (type(error), error.phase, error.status) == (ServerFailure, phase, status)
    assert "engine core died" in str(error)
    assert error.remedy in str(error)
    assert isinstance(error, TrainerError)
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert (type(again), again.phase, str(again)) == (ServerFailure, phase, str(error))


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
def test_an_error_at_the_start_is_of_the_phase_ready(
    path: str, policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    server.faults[path] = (500, {"error": f"engine core died{'!' * 100_000}"})
    with publishing(policy, tmp_path, server) as publisher, pytest.raises(ServerFailure) as caught:
        publisher.start(0)
    require_phase(caught.value, Phase.READY, 500)
    assert len(str(caught.value)) < 1500, "a long text is cut"


@pytest.mark.parametrize(
    ("path", "phase", "answer"),
    [
        ("/pause", Phase.PAUSE, (500, {"error": "engine core died"})),
        ("/collective_rpc", Phase.LOAD, (500, {"error": "engine core died"})),
        ("/collective_rpc", Phase.LOAD, (503, {"error": "engine core died"})),
        ("/collective_rpc", Phase.LOAD, (200, {"success": False, "message": "engine core died"})),
        ("/reset_prefix_cache", Phase.RESET_CACHES, (500, {"error": "engine core died"})),
        ("/update_weight_version", Phase.TAG, (500, {"error": "engine core died"})),
        ("/resume", Phase.RESUME, (500, {"error": "engine core died"})),
        ("/v1/completions", Phase.VERIFY, (500, {"error": "engine core died"})),
        ("/weight_info", Phase.VERIFY, (500, {"error": "engine core died"})),
    ],
)
def test_an_error_in_a_phase_has_its_name_and_the_servers_text_and_the_server_runs_on(
    path: str, phase: Phase, answer: Answer, publisher: Publisher, server: StandIn
) -> None:
    server.faults[path] = answer
    with pytest.raises(ServerFailure) as caught:
        publisher.publish(1)
    require_phase(caught.value, phase, answer[0])
    assert publisher.served_version == 0
    assert server.paused is (phase is Phase.RESUME)
    if phase is Phase.LOAD:  # sent once, whatever came of it; the rest of the update is skipped
        assert server.paths() == ["/pause", "/collective_rpc", "/resume"]


def test_a_failed_resume_is_reported_together_with_the_first_error(
    publisher: Publisher, server: StandIn
) -> None:
    server.faults["/collective_rpc"] = (500, {"error": "out of memory"})
    server.faults["/resume"] = (500, {"error": "engine core died"})
    with pytest.raises(PublishFailed, match=r"out of memory(.|\n)*engine core died") as caught:
        publisher.publish(1)
    (outcome,) = caught.value.outcomes
    assert [error.phase for error in outcome.errors] == [Phase.LOAD, Phase.RESUME]
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301 - our own bytes


@pytest.mark.parametrize("options", [{"overlap": False}])
def test_an_interrupt_while_loading_still_resumes(
    publisher: Publisher, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(VllmRoutes, "load_directory", interrupt)
    with pytest.raises(KeyboardInterrupt):
        publisher.publish(1)
    assert server.paths() == ["/pause", "/resume"]


def test_a_wrong_version_label_fails_even_when_the_numbers_agree(
    publisher: Publisher, server: StandIn
) -> None:
    server.faults["/weight_info"] = (200, {"weight_version": "41"})
    with pytest.raises(VerificationFailed, match="labels its weights '41'"):
        publisher.publish(1)


def test_a_server_without_version_labels_is_proven_by_its_numbers(
    publisher: Publisher, policy: Policy, server: StandIn
) -> None:
    for path in ("/weight_info", "/update_weight_version", "/is_paused"):
        server.faults[path] = (404, {"detail": "Not Found"})
    policy.weights = STEP
    assert publisher.publish(1).verified


@pytest.mark.parametrize(
    ("prompt_logprobs", "found"),
    [
        (None, "no prompt_logprobs"),
        ([], "0 prompt_logprobs for prompt 0 of 40"),
        ([None, {"7": {"logprob": -1.0}}], "2 prompt_logprobs"),
        ([None] * 40, "no log-prob for its token"),
        ("none today", "not a CompletionReply.*none today"),
    ],
    ids=["absent", "empty", "too few", "all null", "another shape"],
)
def test_a_scoring_reply_without_the_prompts_own_tokens_is_refused(
    prompt_logprobs: Any, found: str, publisher: Publisher, server: StandIn
) -> None:
    choices = [
        {"index": index, "text": "", "prompt_logprobs": prompt_logprobs} for index in range(len(PROBES.texts))
    ]
    server.faults["/v1/completions"] = (200, {"model": "m", "choices": choices, "usage": {}})
    with pytest.raises(ServerFailure, match=f"verify failed.*{found}"):
        publisher.publish(1)


def test_a_server_that_starts_late_is_waited_for_and_so_is_its_engines_first_answer(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    def late() -> None:
        server.faults.pop("/is_paused")
        time.sleep(1.0)

    server.faults = {"/health": away_for_a_moment(), "/is_paused": late}
    with publishing(policy, tmp_path, server, pause_timeout=0.5) as publisher:
        assert publisher.start(0).verified
    assert server.paths().count("/health") == 3


def away_for_a_moment() -> Callable[[], Answer | None]:
    """A server that is not there yet, and a proxy before it that says so."""
    answers = iter([(503, {}), (502, {})])
    return lambda: next(answers, None)


def test_a_server_that_never_comes_up_is_named(policy: Policy, tmp_path: Path) -> None:
    with closing(socket.socket()) as reserved:
        reserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        with (
            publishing(policy, tmp_path, servers=[url], ready_timeout=0.7) as publisher,
            pytest.raises(PhaseDeadlineExceeded, match="no connection") as caught,
        ):
            publisher.start(0)
    assert caught.value.server == url


def test_a_short_unavailability_during_a_publish_is_bridged(publisher: Publisher, server: StandIn) -> None:
    server.faults["/resume"] = away_for_a_moment()
    publisher.publish(1)
    assert server.paths().count("/resume") == 3


def test_of_several_servers_the_one_that_lies_is_named_and_the_others_outcomes_are_there(
    policy: Policy, tmp_path: Path
) -> None:
    servers = honest, liar = StandIn(BASE), StandIn(BASE)
    liar.load = lambda old, new: old
    with serving(*servers), publishing(policy, tmp_path, *servers) as publisher:
        publisher.start(0)
        policy.weights = STEP
        with pytest.raises(PublishFailed, match="1 of 2 servers") as caught:
            publisher.publish(1)
        assert publisher.served_version == 0
        liar.load = lambda old, new: new
        assert len(publisher.publish(1).servers) == 2
    outcomes = {outcome.server: outcome for outcome in caught.value.outcomes}
    assert outcomes[liar.url].is_disproved
    assert outcomes[honest.url].errors == ()
    assert publisher.served_version == 1


def test_old_versions_are_pruned_the_served_one_never_and_after_a_failure_none(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    directory = tmp_path / "published"
    (directory / "v000099").mkdir(parents=True)  # left by an earlier run that went further
    (directory / "notes").mkdir()
    with publishing(policy, directory, server, keep=2) as publisher:
        publisher.start(0)
        for version in range(1, 5):
            policy.weights = (0.5 + 0.1 * version, 0.3)
            publisher.publish(version)
        kept = ["notes", "v000003", "v000004"]
        assert sorted(path.name for path in directory.iterdir()) == kept
        server.faults["/pause"] = (500, {})
        with pytest.raises(ServerFailure, match="pause failed"):
            publisher.publish(5)
        assert sorted(path.name for path in directory.iterdir()) == [*kept, "v000005"]


def test_the_same_version_is_written_once_however_often_it_is_published(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    written: list[Path] = []
    write = policy.write

    def counted(path: Path, weights: Weights) -> None:
        written.append(path)
        write(path, weights)

    policy.write = counted  # type: ignore[method-assign]
    with publishing(policy, tmp_path, server) as publisher:
        server.weights = STEP
        publisher.start(3)
        server.weights = STEP  # restarted
        publisher.publish(3)
    assert written == [tmp_path / "v000003"]
    assert server.weights == BASE


def test_weights_that_cannot_be_written_touch_no_server(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    with publishing(policy, tmp_path / "file" / "published", server) as publisher:
        publisher.start(0)
        publisher.settle()
        shutil.rmtree(tmp_path / "file")
        (tmp_path / "file").write_text("a file where the directory should be")
        server.calls.clear()
        with pytest.raises(StagingFailed, match="v000001"):
            publisher.publish(1)
    assert server.calls == []


def test_several_models_on_one_server_are_refused_until_one_is_named(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    server.faults["/v1/models"] = (200, {"data": [{"id": "policy"}, {"id": "judge"}]})
    with (
        publishing(policy, tmp_path, server) as publisher,
        pytest.raises(ServerFailure, match=r"ready failed.*\['policy', 'judge'\]"),
    ):
        publisher.start(0)
    with publishing(policy, tmp_path, server, served_model_name="policy") as publisher:
        assert publisher.start(0).already_served


def test_without_a_server_there_is_nothing_to_publish_to(policy: Policy, tmp_path: Path) -> None:
    transport = DiskTransport(tmp_path, policy.capture, keep=1)
    with pytest.raises(ConfigurationError, match=r"publish\.servers"):
        Publisher(PublishSettings(), transport=transport, servers=[], probes=PROBES, score=policy.score)

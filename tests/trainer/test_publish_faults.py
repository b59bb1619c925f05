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

from tests.trainer.inference_stand_in import BASE, PROBES, STEP, Policy, StandIn, Weights, serving
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
ROUTES = [
    ("/health", Phase.READY),
    ("/v1/models", Phase.READY),
    ("/pause", Phase.PAUSE),
    ("/collective_rpc", Phase.LOAD),
    ("/reset_prefix_cache", Phase.RESET_CACHES),
    ("/update_weight_version", Phase.TAG),
    ("/resume", Phase.RESUME),
    ("/v1/completions", Phase.VERIFY),
    ("/weight_info", Phase.VERIFY),
]
AFTER_START = [route for route in ROUTES if route[1] is not Phase.READY]


def always(status: int, body: Any) -> Callable[[], tuple[int, Any]]:
    return lambda: (status, body)


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


def test_a_server_with_other_weights_gets_them_at_the_start(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    server.weights = STEP
    with publishing(policy, tmp_path, server) as publisher:
        report = publisher.start(7)
    assert not report.already_served
    assert server.weights == BASE
    assert server.label == "7"
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


def test_a_server_left_paused_by_a_dead_trainer_is_resumed_at_the_start(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    server.paused = True
    with publishing(policy, tmp_path, server) as publisher:
        publisher.start(0)
    assert not server.paused


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
        versions = iter(range(1, 60))

        def train_and_publish() -> None:
            for version in versions:
                policy.weights = (BASE[0] + 0.005 * version, BASE[1])
                report = publisher.publish(version)
                assert report.metrics()["publish/distinguishable"] == 0.0

        with pytest.raises(VerificationFailed) as caught:
            train_and_publish()
    assert 2 < next(versions) < 60
    assert caught.value.comparison is not None
    assert caught.value.comparison.verdict is Verdict.STALE
    assert caught.value.comparison.mean_difference < 0.25  # the tolerance alone would not have seen it


@pytest.mark.parametrize(
    ("path", "phase", "deadline"),
    [
        ("/health", Phase.READY, "ready_timeout"),
        ("/collective_rpc", Phase.LOAD, "load_timeout"),
    ],
)
def test_a_hang_ends_at_its_phases_deadline_and_names_the_phase(
    path: str, phase: Phase, deadline: str, policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    # Only the phase that hangs: a busy machine must not end another one first.
    with publishing(policy, tmp_path, server, **{deadline: 1.0}) as publisher:
        if phase is not Phase.READY:
            publisher.start(0)
        server.faults[path] = server.hang
        with pytest.raises(PhaseDeadlineExceeded) as caught:
            publisher.start(0) if phase is Phase.READY else publisher.publish(1)
    error = caught.value
    assert isinstance(error, TimeoutError)
    assert error.phase is phase
    assert error.server == server.url
    assert "1 s" in str(error)
    if phase is not Phase.READY:
        assert error.version == 1
        assert "/resume" in server.paths()


@pytest.mark.parametrize(
    ("status", "body", "path", "phase"),
    [
        *((500, {"error": "engine core died"}, *route) for route in ROUTES),
        (200, {"success": False, "message": "engine core died"}, "/collective_rpc", Phase.LOAD),
    ],
)
def test_an_error_in_any_phase_has_the_phases_name_and_the_servers_text_and_the_server_runs_on(
    status: int,
    body: Any,
    path: str,
    phase: Phase,
    policy: Policy,
    server: StandIn,
    tmp_path: Path,
) -> None:
    with publishing(policy, tmp_path, server) as publisher:
        if phase is not Phase.READY:
            publisher.start(0)
        server.calls.clear()
        server.faults[path] = (status, body)
        with pytest.raises(ServerFailure) as caught:
            publisher.start(0) if phase is Phase.READY else publisher.publish(1)
    error = caught.value
    assert type(error) is ServerFailure
    assert error.phase is phase
    assert error.status == status
    assert "engine core died" in str(error)
    assert error.remedy in str(error)
    if phase not in (Phase.READY, Phase.RESUME):
        assert "/resume" in server.paths()
        assert not server.paused
    if phase is not Phase.READY:
        assert publisher.served_version == 0


def test_after_a_failed_load_the_rest_of_the_update_is_skipped_but_not_the_resume(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    with publishing(policy, tmp_path, server) as publisher:
        publisher.start(0)
        server.calls.clear()
        server.faults["/collective_rpc"] = (500, {"error": {"message": "shape mismatch"}})
        with pytest.raises(ServerFailure, match=r"load failed.*shape mismatch"):
            publisher.publish(1)
    assert server.paths() == ["/pause", "/collective_rpc", "/resume"]


def test_a_failed_resume_is_reported_together_with_the_first_error(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    with publishing(policy, tmp_path, server) as publisher:
        publisher.start(0)
        server.faults["/collective_rpc"] = (500, {"error": "out of memory"})
        server.faults["/resume"] = (500, {"error": "engine core died"})
        with pytest.raises(PublishFailed) as caught:
            publisher.publish(1)
    (outcome,) = caught.value.outcomes
    assert [error.phase for error in outcome.errors] == [Phase.LOAD, Phase.RESUME]
    assert "out of memory" in str(caught.value)
    assert "engine core died" in str(caught.value)


def test_an_interrupt_while_loading_still_resumes(
    policy: Policy, server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with publishing(policy, tmp_path, server, overlap=False) as publisher:
        publisher.start(0)
        server.calls.clear()

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(VllmRoutes, "load_directory", interrupt)
        with pytest.raises(KeyboardInterrupt):
            publisher.publish(1)
    assert server.paths() == ["/pause", "/resume"]


def test_a_wrong_version_label_fails_even_when_the_numbers_agree(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    with publishing(policy, tmp_path, server) as publisher:
        publisher.start(0)
        server.faults["/weight_info"] = (200, {"weight_version": "41"})
        with pytest.raises(VerificationFailed, match="labels its weights '41'"):
            publisher.publish(1)


def test_a_server_without_version_labels_is_proven_by_its_numbers(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    for path in ("/weight_info", "/update_weight_version", "/is_paused"):
        server.faults[path] = (404, {"detail": "Not Found"})
    with publishing(policy, tmp_path, server) as publisher:
        publisher.start(0)
        policy.weights = STEP
        assert publisher.publish(1).verified


@pytest.mark.parametrize(
    "prompt_logprobs",
    [None, [], [None, {"7": {"logprob": -1.0}}], [None] * 40],
    ids=["absent", "empty", "too few", "all null"],
)
def test_a_scoring_reply_without_the_prompts_own_tokens_is_refused(
    prompt_logprobs: Any, policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    choices = [
        {"index": index, "text": "", "prompt_logprobs": prompt_logprobs} for index in range(len(PROBES.texts))
    ]
    server.faults["/v1/completions"] = (200, {"model": "m", "choices": choices, "usage": {}})
    with (
        publishing(policy, tmp_path, server) as publisher,
        pytest.raises(ServerFailure, match=r"verify failed.*log"),
    ):
        publisher.start(0)


def test_a_reply_that_is_not_the_expected_json_is_refused_naming_the_field(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    server.faults["/v1/completions"] = (200, {"choices": "none today"})
    with (
        publishing(policy, tmp_path, server) as publisher,
        pytest.raises(ServerFailure, match=r"verify failed.*not a CompletionReply.*none today"),
    ):
        publisher.start(0)


def test_a_server_that_starts_late_is_waited_for(policy: Policy, server: StandIn, tmp_path: Path) -> None:
    answers = iter([503, 502])  # itself, and a proxy before it
    server.faults["/health"] = lambda: (status, {}) if (status := next(answers, None)) else None
    with publishing(policy, tmp_path, server) as publisher:
        publisher.start(0)
    assert server.paths().count("/health") == 3


def test_an_engine_that_is_late_with_its_first_answer_is_waited_for(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    def late() -> None:
        server.faults.pop("/is_paused")
        time.sleep(1.0)

    server.faults["/is_paused"] = late
    with publishing(policy, tmp_path, server, pause_timeout=0.5) as publisher:
        assert publisher.start(0).verified


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


def test_a_short_unavailability_during_a_publish_is_bridged(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    with publishing(policy, tmp_path, server) as publisher:
        publisher.start(0)
        answers = iter([503, 502])  # itself, and a proxy before it
        server.faults["/resume"] = lambda: (status, {}) if (status := next(answers, None)) else None
        policy.weights = STEP
        publisher.publish(1)
    assert server.paths().count("/resume") == 3


def test_loading_is_never_sent_twice(policy: Policy, server: StandIn, tmp_path: Path) -> None:
    with publishing(policy, tmp_path, server) as publisher:
        publisher.start(0)
        server.faults["/collective_rpc"] = (503, {})
        with pytest.raises(ServerFailure, match="load failed"):
            publisher.publish(1)
    assert server.paths().count("/collective_rpc") == 1


def test_of_several_servers_the_one_that_lies_is_named_and_the_others_outcomes_are_there(
    policy: Policy, tmp_path: Path
) -> None:
    honest, liar, other = StandIn(BASE), StandIn(BASE), StandIn(BASE)
    liar.load = lambda old, new: old
    with (
        serving(honest, liar, other),
        publishing(policy, tmp_path, honest, liar, other) as publisher,
    ):
        publisher.start(0)
        policy.weights = STEP
        with pytest.raises(PublishFailed) as caught:
            publisher.publish(1)
        assert publisher.served_version == 0
        liar.load = lambda old, new: new
        report = publisher.publish(1)
    outcomes = {outcome.server: outcome for outcome in caught.value.outcomes}
    assert [type(error) for error in outcomes[liar.url].errors] == [VerificationFailed]
    assert outcomes[honest.url].errors == outcomes[other.url].errors == ()
    assert "1 of 3 servers" in str(caught.value)
    assert len(report.servers) == 3
    assert publisher.served_version == 1


def test_old_versions_are_pruned_and_the_served_one_never(
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
    assert sorted(path.name for path in directory.iterdir()) == ["notes", "v000003", "v000004"]


def test_a_failed_publish_deletes_nothing(policy: Policy, server: StandIn, tmp_path: Path) -> None:
    with publishing(policy, tmp_path, server, keep=1) as publisher:
        publisher.start(0)
        publisher.publish(1)
        server.faults["/pause"] = (500, {})
        with pytest.raises(ServerFailure, match="pause failed"):
            publisher.publish(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v000001", "v000002"]


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


def test_a_version_left_by_an_earlier_run_is_replaced(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    Policy(STEP).write(tmp_path / "v000003", STEP)
    server.weights = (0.0, 0.0)
    with publishing(policy, tmp_path, server) as publisher:
        publisher.start(3)
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


def test_the_token_goes_to_the_server_and_into_no_message(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    server.faults["/health"] = (401, {"error": "Unauthorized: tell-no-one"})
    for given, sent in (
        ({"token": "tell-no-one"}, "Bearer tell-no-one"),
        ({"headers": {"Authorization": "tell-no-one"}}, "tell-no-one"),
    ):
        server.authorizations.clear()
        with (
            publishing(policy, tmp_path, server, **given) as publisher,
            pytest.raises(ServerFailure, match=r"ready failed.*Unauthorized: \*\*\*") as caught,
        ):
            publisher.start(0)
        assert server.authorizations == {sent}
        assert "tell-no-one" not in str(caught.value)


def test_a_long_server_text_is_cut(policy: Policy, server: StandIn, tmp_path: Path) -> None:
    server.faults["/health"] = (500, {"error": "x" * 100_000})
    with (
        publishing(policy, tmp_path, server) as publisher,
        pytest.raises(ServerFailure, match="ready failed") as caught,
    ):
        publisher.start(0)
    assert len(str(caught.value)) < 1500


def test_without_a_server_there_is_nothing_to_publish_to(policy: Policy, tmp_path: Path) -> None:
    transport = DiskTransport(tmp_path, policy.capture, keep=1)
    with pytest.raises(ConfigurationError, match=r"publish\.servers"):
        Publisher(PublishSettings(), transport=transport, servers=[], probes=PROBES, score=policy.score)


def test_every_error_is_a_trainer_error_and_survives_pickling(
    policy: Policy, server: StandIn, tmp_path: Path
) -> None:
    errors: list[Exception] = []
    with publishing(policy, tmp_path, server) as publisher:
        publisher.start(0)
        for path, _ in AFTER_START:
            server.faults = {path: always(500, {"error": "broken"})}
            with pytest.raises(ServerFailure) as caught:
                publisher.publish(1)
            errors.append(caught.value)
        server.faults = {"/pause": always(500, {}), "/resume": always(500, {})}
        with pytest.raises(PublishFailed) as several:
            publisher.publish(1)
        errors.append(several.value)
    for error in errors:
        assert isinstance(error, TrainerError)
        again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert getattr(again, "phase", None) == getattr(error, "phase", None)

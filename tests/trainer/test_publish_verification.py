"""What a server cannot hide: old weights, old cache blocks, an old adapter, the kind of its log-probs."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.inference_stand_in import (
    BASE,
    VOCABULARY,
    Policy,
    StandIn,
    Weights,
    next_logprobs,
)
from tests.trainer.publishing import publishing, settings_for
from trainer.publish import (
    LogprobKind,
    LogprobPolicy,
    Probes,
    Publisher,
    ServerFailure,
    Verdict,
    VerificationFailed,
    VllmRoutes,
)
from trainer.publish.verification.compare_next_tokens import (
    ASKED_TEMPERATURE,
    compare_next_tokens,
    logprob_kind,
)
from trainer.publish.verification.verifier import Expectation, ServerVerifier

PROBES = Probes(
    texts=[list(range(7, 47)), [3, 1, 4, 1, 5, 9, 2, 6]], passage=list(range(20, 45)), cuts=(19, 21, 23, 25)
)
STEP: Weights = (0.5001, 0.2999)
BASE_EXPECTED = Expectation(version=0, scores=Policy(BASE).score(PROBES), tolerance=1e-3)


@pytest.fixture
def options() -> dict[str, Any]:
    return {"probes": PROBES}


def verifier_for(server: StandIn, logprobs: LogprobPolicy | None = None) -> ServerVerifier:
    routes = VllmRoutes(server.url, settings_for(server), served_model_name="policy")
    return ServerVerifier(routes, PROBES, logprobs=logprobs)


def test_the_passage_is_cached_before_the_update_and_asked_for_first_after_it(
    publisher: Publisher, server: StandIn, policy: Policy
) -> None:
    policy.weights = STEP
    comparison = publisher.publish(1).servers[0].comparison
    assert server.paths()[:2] == ["/v1/completions", "/pause"]
    assert comparison is not None
    assert comparison.cached_tokens == 0
    assert comparison.next_tokens >= 4 * 5
    assert comparison.next_mean_difference == pytest.approx(0.0, abs=1e-6)
    assert comparison.next_fraction == pytest.approx(1.0, abs=0.01)


def test_a_cache_that_was_not_emptied_is_proven_by_the_servers_own_count(
    publisher: Publisher, server: StandIn
) -> None:
    server.keeps_cache = True
    found = "16 tokens of a passage came from the prefix cache.*or start it without prefix caching"
    with pytest.raises(VerificationFailed, match=found) as caught:
        publisher.publish(1)  # even if the weights are the same
    assert caught.value.comparison is not None
    assert caught.value.comparison.verdict is Verdict.STALE_CACHE
    assert not server.paused


def test_a_cache_that_was_not_emptied_is_seen_in_the_numbers_where_nothing_is_counted(
    publisher: Publisher, server: StandIn, policy: Policy
) -> None:
    server.keeps_cache = True
    server.tells_cached_tokens = False
    assert publisher.publish(1).verified  # nothing has changed, so nothing is stale
    policy.weights = STEP
    with pytest.raises(VerificationFailed, match="what is generated after a cached passage") as caught:
        publisher.publish(2)
    comparison = caught.value.comparison
    assert comparison is not None
    assert comparison.verdict is Verdict.STALE_CACHE
    assert comparison.fraction == pytest.approx(1.0, abs=0.01)  # the texts alone would have passed
    assert comparison.next_fraction is not None
    assert comparison.next_fraction < 0.5


def test_a_passage_that_was_asked_for_before_a_first_comparison_proves_nothing(server: StandIn) -> None:
    verifier = verifier_for(server)
    assert verifier.compare(BASE_EXPECTED).matches
    assert verifier.compare(BASE_EXPECTED).matches
    assert any(PROBES.passage[:16] == list(block) for block in server.cache)


def test_a_server_that_cannot_be_warmed_is_updated_all_the_same(
    publisher: Publisher, server: StandIn, policy: Policy
) -> None:
    refusals = iter([(400, {"error": {"message": "not now"}})])
    server.faults["/v1/completions"] = lambda: next(refusals, None)
    policy.weights = STEP
    assert publisher.publish(1).verified


@pytest.mark.parametrize("scales", [False, True])
def test_raw_and_scaled_log_probs_are_told_apart_once(
    scales: bool, server: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    server.scales_logprobs = scales
    verifier = verifier_for(server, LogprobPolicy(fitting=LogprobKind.SCALED))
    with caplog.at_level(logging.WARNING):
        verifier.compare(BASE_EXPECTED)
        asked = len(server.calls)
        verifier.compare(BASE_EXPECTED)
    assert verifier.logprob_kind is (LogprobKind.SCALED if scales else LogprobKind.RAW)
    assert len(server.calls) == asked + len(PROBES.cuts) + 1  # next tokens and texts, nothing more
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (0 if scales else 1)
    assert all("--logprobs-mode processed_logprobs" in warning for warning in warnings)


def test_log_probs_of_another_kind_than_required_end_the_start(
    server: StandIn, policy: Policy, tmp_path: Path
) -> None:
    required = LogprobPolicy(required="scaled")
    with publishing(policy, tmp_path, server, probes=PROBES, logprobs=required) as publisher:
        with pytest.raises(VerificationFailed, match=r"are raw, and publish\.logprobs asks for scaled ones"):
            publisher.start(0)
        server.scales_logprobs = True
        assert publisher.start(0).already_served


def test_the_kind_of_log_probs_where_the_numbers_fit_neither_or_both() -> None:
    row = next_logprobs(BASE, PROBES.passage)
    shifted = {token: row[token] + 0.3 for token in range(5)}
    options: dict[str, Any] = {"temperature": ASKED_TEMPERATURE, "tolerance": 0.01}
    assert logprob_kind(shifted, row, **options) is LogprobKind.NEITHER
    certain = [-60.0] * VOCABULARY
    certain[3] = 0.0
    assert logprob_kind({3: 0.0}, certain, **options) is LogprobKind.UNCLEAR
    assert logprob_kind({4: -60.0}, certain, **options) is LogprobKind.UNCLEAR


def test_a_token_drawn_against_all_odds_is_not_held_against_the_server() -> None:
    row = [math.log(0.999 / 9)] * 9 + [-14.0]
    served = ({0: row[0], 9: -17.0},)
    assert compare_next_tokens(served, (row,), tolerance=1e-3).matches
    assert compare_next_tokens(({0: row[0] - 0.1},), (row,), tolerance=1e-3).verdict is Verdict.OVER_TOLERANCE


@pytest.mark.parametrize(
    "choice",
    [
        {"index": 0, "text": "x"},
        {"index": 0, "text": "x", "logprobs": {"tokens": [" harbour"], "token_logprobs": [-1.0]}},
        {"index": 0, "text": "x", "logprobs": {"tokens": ["token_id:5"], "token_logprobs": [None]}},
        {"index": 0, "text": "x", "logprobs": {"tokens": [], "token_logprobs": []}},
    ],
    ids=["no log-probs", "a text for a token id", "null", "no token"],
)
def test_a_reply_that_does_not_name_its_tokens_is_refused(choice: Any, server: StandIn) -> None:
    server.faults["/v1/completions"] = (200, {"model": "m", "choices": [choice], "usage": {}})
    with pytest.raises(ServerFailure, match=r"verify failed.*log-prob"):
        verifier_for(server).compare(BASE_EXPECTED)


@pytest.mark.parametrize(
    ("number", "logprob"), [(100, -1.0), (5, -1.7e308)], ids=["beyond the vocabulary", "no log-prob"]
)
def test_numbers_that_no_model_gives_are_a_failure_of_the_server(
    publisher: Publisher, number: int, logprob: float, server: StandIn, policy: Policy
) -> None:
    named = {"tokens": [f"token_id:{number}"], "token_logprobs": [logprob]}
    rivals = {f"token_id:{number}": logprob, "token_id:7": logprob}
    choice = {"index": 0, "text": "x", "logprobs": {**named, "top_logprobs": [rivals]}}
    server.faults["/v1/completions"] = (200, {"model": "m", "choices": [choice], "usage": {}})
    policy.weights = STEP
    with pytest.raises(VerificationFailed, match=rf"gives token {number} the log-prob .*has 100 tokens"):
        publisher.publish(1)


def rounding(size: float, seed: int = 0) -> Callable[[], float]:
    generator = random.Random(seed)
    return lambda: generator.gauss(0.0, size)


def test_a_server_that_is_suddenly_further_off_than_usual_is_refused_within_the_tolerance(
    server: StandIn, policy: Policy, tmp_path: Path
) -> None:
    policy.dtype = "bfloat16"
    server.noise = rounding(0.05)
    with publishing(policy, tmp_path, server, probes=PROBES) as publisher:
        publisher.start(0)
        for version in range(1, 6):
            policy.weights = (BASE[0] + version * 0.01, BASE[1])
            assert publisher.publish(version).verified
        server.noise = rounding(0.15)
        with pytest.raises(VerificationFailed, match="further off than usual") as caught:
            publisher.publish(6)
    comparison = caught.value.comparison
    assert comparison is not None
    assert comparison.bound < comparison.mean_difference < comparison.tolerance


def test_the_first_publish_is_held_to_what_the_server_was_off_with_the_weights_it_started_with(
    server: StandIn, policy: Policy, tmp_path: Path
) -> None:
    policy.dtype = "bfloat16"
    server.noise = rounding(0.05)

    def load(old: Weights, new: Weights) -> Weights:
        server.noise = rounding(0.15)  # what was loaded is not quite what was sent
        return new

    server.load = load
    with (
        publishing(policy, tmp_path, server, probes=PROBES) as publisher,
        pytest.raises(VerificationFailed, match="further off than usual"),
    ):
        publisher.start(0)

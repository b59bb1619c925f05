"""The self-test of publishing: equal weights, sent as a run would send them, must change nothing.

The model is loaded and published twice, untouched, through the configured transport. Every publish is
verified as in a run, and afterwards each server has to say exactly what it said before: a difference would
come from the way of the weights, not from training.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.check._result import CheckResult, failed, passed, warned
from trainer.config import TrainerConfig
from trainer.errors import TrainerError
from trainer.publish import (
    Comparison,
    InferenceServer,
    LogprobKind,
    PublishReport,
    ServerFailure,
    VerificationFailed,
)
from trainer.run.accelerator import make_accelerator
from trainer.run.build import build_publisher, build_servers
from trainer.run.places import publish_directory
from trainer.run.train_state import prepare_run

logger = logging.getLogger(__name__)

NEGLIGIBLE = 0.1
"""Of the tolerance: servers on GPUs may give slightly different numbers for the same weights."""

PUBLISHES = 2
"""Besides what the start of a run does."""

_NAME = "publish self-test"
_LOOK_AT_LOG = "look into the server's log; docs/publishing.md has every error and its remedy"


def check_publish(config: TrainerConfig) -> Iterator[CheckResult]:
    """Publish the weights that a run would start from, and see that nothing changes.

    The servers then serve these weights under their version, as after the start of a run, and are not paused.
    """
    config = _with_own_directory(config)
    directory = config.publish.directory
    try:
        yield from _publish_unchanged(config)
    except TrainerError as error:
        yield _explained(error)
    finally:
        # Adapters stay: a server may read an adapter's directory as long as it knows its name.
        if directory is not None and config.publish.transport == "disk":
            shutil.rmtree(directory, ignore_errors=True)
    yield from _still_running(config)


def _with_own_directory(config: TrainerConfig) -> TrainerConfig:
    """Below the configured directory, where the servers see it, and apart from a run's versions.

    Deltas stay where the servers' workers may read, and nowhere else.
    """
    if config.publish.transport == "delta":
        return config
    parent = publish_directory(config)
    publish = config.publish.model_copy(update={"directory": Path(parent) / "self-test"})
    return config.model_copy(update={"publish": publish})


def _publish_unchanged(config: TrainerConfig) -> Iterator[CheckResult]:
    if make_accelerator(config).num_processes > 1:
        yield warned(_NAME, "was left out: it is for one process", "start it without a launcher")
        return
    prepared = prepare_run(config)
    with prepared.joined:
        version = prepared.state.policy_version
        publisher = build_publisher(config, prepared)
        if publisher is None:
            yield warned(_NAME, "publish.transport is none: nothing is published", "set publish.transport")
            return
        with publisher:
            reports = [publisher.start(version)]
            reports += [publisher.publish(version) for _ in range(PUBLISHES)]
    yield from _judge(reports)


def _judge(reports: Sequence[PublishReport]) -> Iterator[CheckResult]:
    last = reports[-1]
    staging = max(report.stage_seconds for report in reports)  # a version is written once
    yield passed(
        _NAME,
        f"version {last.version} published {PUBLISHES} times in {last.total_seconds:.1f} s each: "
        f"{last.capture_seconds:.1f} s copying and scoring, {staging:.1f} s writing, generation "
        f"stood still for {last.pause_seconds:.1f} s, {last.weight_bytes / 1e6:.0f} MB",
    )
    for outcome in last.servers:
        name = f"{_NAME} {outcome.server}"
        comparison = outcome.comparison
        if comparison is None:
            yield warned(name, "not verified", "set publish.verify to true: without it nothing is proven")
            continue
        yield _judge_numbers(name, comparison)
        yield _judge_kind(name, comparison)
        yield _judge_cache(name, comparison)


def _judge_numbers(name: str, comparison: Comparison) -> CheckResult:
    moved = comparison.served_movement or 0.0
    found = (
        f"{comparison.tokens} log-probs are {comparison.mean_difference:.2g} nats from the trainer's "
        f"(tolerance {comparison.tolerance:.2g}) and "
    )
    if moved > max(comparison.mean_difference, NEGLIGIBLE * comparison.tolerance):
        remedy = (
            "equal weights must give equal log-probs: look for a server that loads only a part of them, or "
            "for weights that the way to it rounds differently each time"
        )
        return failed(name, f"{found}moved by {moved:.2g}, though the weights did not change", remedy)
    same = "did not move at all" if moved == 0 else f"moved by {moved:.2g} only"
    return passed(name, found + same)


def _judge_kind(name: str, comparison: Comparison) -> CheckResult:
    kind = comparison.logprob_kind
    if kind is None:
        return warned(
            name, "was not asked to generate: the context is too short", "raise atropos.max_token_length"
        )
    found = f"at temperatures other than 1 its log-probs are {kind}"
    if kind in (LogprobKind.RAW, LogprobKind.SCALED, LogprobKind.UNCLEAR):
        return passed(name, found)
    return warned(name, found, "start vLLM with --logprobs-mode raw_logprobs or processed_logprobs")


def _judge_cache(name: str, comparison: Comparison) -> CheckResult:
    if comparison.cached_tokens is None:
        return warned(
            name,
            "does not tell how much of a prompt comes from the prefix cache",
            "start vLLM with --enable-prompt-tokens-details: then a stale cache is seen at once",
        )
    return passed(
        name, "tells how much of a prompt comes from the prefix cache; nothing did after the update"
    )


def _explained(error: TrainerError) -> CheckResult:
    if isinstance(error, VerificationFailed):
        found = f"{error.server}: unchanged weights were sent, and it does not serve them: {error.reason}"
        return failed(_NAME, found, error.remedy)
    if isinstance(error, ServerFailure):
        said = f"; it said: {error.server_text}" if error.server_text else ""
        return failed(_NAME, f"{error.server}: {error.phase}: {error.reason}{said}", error.remedy)
    return failed(_NAME, str(error), _LOOK_AT_LOG)


def _still_running(config: TrainerConfig) -> Iterator[CheckResult]:
    """No server may be left paused; one that is gets resumed, and is reported."""
    for server in build_servers(config.publish):
        try:
            yield from _resumed(server)
        except ServerFailure as error:
            yield failed(_NAME, f"{error.server}: {error.reason}", error.remedy)
        finally:
            server.close()


def _resumed(server: InferenceServer) -> Iterator[CheckResult]:
    if server.is_paused():
        server.resume()
        yield failed(_NAME, f"{server.url} was left paused and has been resumed", _LOOK_AT_LOG)

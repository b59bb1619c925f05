"""Asking one server what it serves, and remembering what was proven.

The order of the questions matters. What was cached before the update has to be asked for first: scoring the
texts fills the cache too. And the first answer alone can show that nothing was cached.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

from trainer.publish._protocol import InferenceServer, NextToken
from trainer.publish.comparison import (
    DEFAULT_DTYPE,
    TOLERANCES,
    Baseline,
    Comparison,
    ProbeScores,
    Scores,
    Verdict,
    compare,
)
from trainer.publish.errors import Phase, ServerFailure, VerificationFailed
from trainer.publish.generation import (
    ASKED_TEMPERATURE,
    LogprobKind,
    NextTokens,
    ProvenGeneration,
    compare_next_tokens,
    logprob_kind,
)
from trainer.publish.probes import Probes

logger = logging.getLogger(__name__)

REMEMBERED = 8
"""Proven versions whose differences make up what is usual at a server: few, so that it follows the model."""


def tolerance_for(dtype: str | None, configured: float | None) -> float:
    """The tolerance in nats: as configured, else by the type of the published weights."""
    if configured is not None:
        return configured
    return TOLERANCES.get(dtype or DEFAULT_DTYPE, TOLERANCES[DEFAULT_DTYPE])


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What every server should say of a version."""

    version: int
    scores: ProbeScores
    """The trainer's own log-probs of the probes."""
    tolerance: float
    """Largest mean difference accepted, in nats."""


def make_expectation(
    score: Callable[[Probes], ProbeScores], probes: Probes, version: int, tolerance: float
) -> Expectation:
    """Score the probes with the trainer's own weights, as they are now."""
    return Expectation(version=version, scores=score(probes), tolerance=tolerance)


@dataclass(frozen=True, kw_only=True)
class LogprobPolicy:
    """What kind of log-probs the run needs from the servers at temperatures other than 1."""

    required: Literal["any", "raw", "scaled"] = "any"
    """Anything else is an error."""
    fitting: LogprobKind | None = None
    """Anything else is warned of. None: the loss does not look at them."""


@dataclass(frozen=True, kw_only=True)
class _Proven:
    """An earlier version that was proven, with everything that was said of it."""

    version: int
    expected: ProbeScores
    texts: Scores
    next_tokens: NextTokens

    def of_texts(self) -> Baseline:
        return Baseline(version=self.version, expected=self.expected.texts, served=self.texts)

    def of_generation(self) -> ProvenGeneration:
        return ProvenGeneration(
            version=self.version, expected=self.expected.next_tokens, served=self.next_tokens
        )


class ServerVerifier:
    """Verifies one server, again and again. Used from one thread at a time.

    Args:
        server: The server.
        probes: What it is asked.
        logprobs: What its log-probs have to be at temperatures other than 1.
    """

    def __init__(
        self, server: InferenceServer, probes: Probes, *, logprobs: LogprobPolicy | None = None
    ) -> None:
        self._server = server
        self._probes = probes
        self._logprobs = logprobs or LogprobPolicy()
        self._proven: _Proven | None = None
        self._differences: deque[float] = deque(maxlen=REMEMBERED)
        self._first_difference: float | None = None
        self._served_name: str | None = None
        self.logprob_kind: LogprobKind | None = None
        """Of this server; None until it was asked, which happens when it is first found to match."""

    def warm(self, version: int) -> None:
        """Bring the passage into the server's prefix cache while it still has its old weights.

        Afterwards a cache that was not emptied gives itself away. If it fails the update goes on: a server
        that does not answer says so again when it is paused.
        """
        if not self._probes.cuts:
            return
        try:
            self._server.next_token(self._probes.prompts[-1], version, served_name=self._served_name)
        except ServerFailure as error:
            logger.info("%s: the passage could not be cached before the update: %s", self._server.url, error)

    def compare(self, expectation: Expectation, *, served_name: str | None = None) -> Comparison:
        """Ask the server and judge the numbers; a match may become the next baseline.

        Raises:
            VerificationFailed: It matches, but its log-probs are not of the kind that `publish.logprobs`
                asks for.
            ServerFailure: The server did not answer.
        """
        return self._compare(expectation, served_name, updated=False)

    def verify(self, expectation: Expectation, *, served_name: str | None = None) -> Comparison:
        """Prove that the server serves a version that it was just given.

        Raises:
            VerificationFailed: It does not, by its numbers or by its own label; or as `compare`.
            ServerFailure: The server did not answer.
        """
        version = expectation.version
        # An adapter has a name of its own in the cache, and nothing was emptied for it.
        comparison = self._compare(expectation, served_name, updated=served_name is None)
        if not comparison.matches:
            remedy = CACHE_REMEDY if comparison.verdict is Verdict.STALE_CACHE else None
            raise VerificationFailed(
                comparison.describe(), comparison=comparison, remedy=remedy, **self._where(version)
            )
        self._served_name = served_name
        if served_name is not None:  # an adapter is labelled when it is activated, after the proof
            return comparison
        label = self._server.weight_version(version)
        if label is not None and label != str(version):
            raise VerificationFailed(
                f"the log-probs agree, but the server labels its weights {label!r}; does another trainer "
                "publish to it?",
                **self._where(version),
            )
        return comparison

    def _compare(self, expectation: Expectation, served_name: str | None, *, updated: bool) -> Comparison:
        version, proven = expectation.version, self._proven
        said = self._ask_next_tokens(version, served_name)
        next_tokens = tuple(each.logprobs for each in said)
        texts = self._server.score(self._probes.texts, version, served_name=served_name)
        comparison = compare(
            texts,
            expectation.scores.texts,
            tolerance=expectation.tolerance,
            baseline=proven.of_texts() if proven else None,
            usual=self._usual_difference(),
        )
        if said:
            generated = compare_next_tokens(
                next_tokens,
                expectation.scores.next_tokens,
                tolerance=expectation.tolerance,
                proven=proven.of_generation() if proven else None,
            )
            comparison = _together(
                comparison, generated, cached_tokens=said[0].cached_tokens if updated else None
            )
        logger.info("%s: version %d: %s", self._server.url, version, comparison.describe())
        self._remember_difference(comparison, updated=updated)
        if comparison.matches:
            self._check_kind(expectation, served_name)
            comparison = replace(comparison, logprob_kind=self.logprob_kind)
        # Where old and new could not be told apart the old baseline stays: against it the movement adds up.
        if comparison.matches and (proven is None or comparison.distinguishable):
            self._proven = _Proven(
                version=version, expected=expectation.scores, texts=texts, next_tokens=next_tokens
            )
        return comparison

    def _usual_difference(self) -> float | None:
        """How far this server is off when it has the right weights; None before that is known."""
        return fmean(self._differences) if self._differences else self._first_difference

    def _remember_difference(self, comparison: Comparison, *, updated: bool) -> None:
        if comparison.matches:
            self._differences.append(comparison.mean_difference)
        elif not self._differences and not updated and math.isfinite(comparison.mean_difference):
            # Before the first publish: what a server that loaded the starting weights by itself is off.
            # If it holds other weights this is large, and the first bound is the tolerance, as without it.
            self._first_difference = comparison.mean_difference

    def _ask_next_tokens(self, version: int, served_name: str | None) -> list[NextToken]:
        return [
            self._server.next_token(prompt, version, served_name=served_name)
            for prompt in self._probes.prompts
        ]

    def _check_kind(self, expectation: Expectation, served_name: str | None) -> None:
        """Ask once whether log-probs are raw or scaled, and say so where it matters."""
        if self.logprob_kind is not None or not expectation.scores.next_tokens:
            return
        prompt, row = self._probes.prompts[-1], expectation.scores.next_tokens[-1]
        said = self._server.next_token(
            prompt, expectation.version, temperature=ASKED_TEMPERATURE, served_name=served_name
        )
        kind = logprob_kind(
            said.logprobs, row, temperature=ASKED_TEMPERATURE, tolerance=expectation.tolerance
        )
        found = f"at temperatures other than 1 the server's log-probs are {kind}"
        if self._logprobs.required not in ("any", kind.value):
            raise VerificationFailed(
                f"{found}, and publish.logprobs asks for {self._logprobs.required} ones",
                remedy=KIND_REMEDY,
                **self._where(expectation.version),
            )
        self.logprob_kind = kind
        if self._logprobs.fitting in (None, kind) or kind is LogprobKind.UNCLEAR:
            logger.info("%s: %s", self._server.url, found)
        else:
            logger.warning(
                "%s: %s, but the loss compares them with %s ones: importance ratios of everything that is "
                "sampled at another temperature than 1 will be wrong. What to do: %s",
                self._server.url,
                found,
                self._logprobs.fitting,
                KIND_REMEDY,
            )

    def _where(self, version: int) -> dict[str, Any]:
        return {"server": self._server.url, "phase": Phase.VERIFY, "version": version}


CACHE_REMEDY = (
    "restart the server; if it comes back, see that emptying the cache reaches everything that keeps blocks: "
    "every engine behind this URL, and caches outside the engine; or start it without prefix caching"
)

KIND_REMEDY = (
    "start vLLM with --logprobs-mode processed_logprobs for scaled ones (raw_logprobs, its default, for raw "
    "ones), SGLang with SGLANG_RETURN_ORIGINAL_LOGPROB=1 for raw ones (scaled is its default), set "
    "loss.apply_temperature accordingly, or sample at temperature 1"
)


def _together(texts: Comparison, generated: Comparison, *, cached_tokens: int | None) -> Comparison:
    """One judgement of what was scored and of what was generated."""
    verdict, detail = texts.verdict, texts.detail
    if texts.matches and cached_tokens:
        verdict = Verdict.STALE_CACHE
        detail = (
            f"{cached_tokens} tokens of a passage came from the prefix cache right after it was emptied: "
            "they were computed by earlier weights"
        )
    elif texts.matches and not generated.matches:
        verdict = Verdict.STALE_CACHE
        detail = (
            "What is scored without the prefix cache agrees, what is generated after a cached passage does "
            f"not: {generated.describe()}"
        )
    return replace(
        texts,
        verdict=verdict,
        detail=detail,
        next_tokens=generated.tokens,
        next_mean_difference=generated.mean_difference if generated.tokens else None,
        next_fraction=generated.fraction,
        cached_tokens=cached_tokens,
    )

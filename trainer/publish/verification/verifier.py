"""Asks one server what it serves, and remembers what was proven.

The order of the questions matters. What was cached before the update has to be asked for first: scoring the
texts fills the cache too. And the first answer alone can show that nothing was cached.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

from trainer.publish.errors import Phase, ServerFailure
from trainer.publish.interfaces import InferenceServer, NextToken
from trainer.publish.verification.compare_logprobs import (
    DEFAULT_DTYPE,
    TOLERANCES,
    Baseline,
    Comparison,
    ProbeScores,
    Verdict,
    compare,
    is_logprob,
)
from trainer.publish.verification.compare_next_tokens import (
    ASKED_TEMPERATURE,
    LogprobKind,
    ProvenGeneration,
    compare_next_tokens,
    logprob_kind,
)
from trainer.publish.verification.probes import Probes

logger = logging.getLogger(__name__)

REMEMBERED = 8
"""Window of the per-server error baseline, in proven versions: few, so that it follows the model."""


class VerificationFailed(ServerFailure):
    """The server does not serve the weights that were published.

    Attributes:
        comparison: The numbers; None if the server's version label alone was wrong.
    """

    remedy = (
        "restart the server on the published directory; if it computes in a lower precision than the "
        "published weights, set publish.dtype or publish.tolerance accordingly"
    )

    def __init__(self, reason: str, *, comparison: Comparison | None = None, **where: Any) -> None:
        super().__init__(reason, **where)
        self.comparison = comparison


def tolerance_for(dtype: str | None, configured: float | None) -> float:
    """Return the tolerance in nats: as configured, else by the type of the published weights."""
    if configured is not None:
        return configured
    return TOLERANCES.get(dtype or DEFAULT_DTYPE, TOLERANCES[DEFAULT_DTYPE])


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """Holds what every server should say of a version."""

    version: int
    scores: ProbeScores
    """The trainer's own log-probs of the probes."""
    tolerance: float
    """Largest mean difference accepted, in nats."""


@dataclass(frozen=True, kw_only=True)
class LogprobPolicy:
    """States the kind of log-probs that the run needs from servers at temperatures other than 1."""

    required: Literal["any", "raw", "scaled"] = "any"
    """Anything else is an error."""
    fitting: LogprobKind | None = None
    """Anything else is warned of. None: the loss does not look at them."""


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
        self._proven_texts: Baseline | None = None
        self._proven_generation: ProvenGeneration | None = None
        self._differences: deque[float] = deque(maxlen=REMEMBERED)
        self._first_difference: float | None = None
        self.logprob_kind: LogprobKind | None = None
        """Of this server; None until it was asked, which happens when it is first found to match."""

    def warm(self) -> None:
        """Bring the passage into the server's prefix cache while it still has its old weights.

        Afterwards a cache that was not emptied gives itself away. If it fails the update goes on: a server
        that does not answer says so again when it is paused.
        """
        if not self._probes.cuts:
            return
        try:
            self._server.next_token(self._probes.prompts[-1])
        except ServerFailure as error:
            logger.info("%s: the passage could not be cached before the update: %s", self._server.url, error)

    def compare(self, expectation: Expectation) -> Comparison:
        """Ask the server and judge the numbers; a match may become the next baseline.

        Raises:
            VerificationFailed: It matches, but its log-probs are not of the kind that `publish.logprobs`
                asks for.
            ServerFailure: The server did not answer.
        """
        return self._compare(expectation, None, updated=False)

    def verify(self, expectation: Expectation, *, served_name: str | None = None) -> Comparison:
        """Prove that the server serves a version that it was just given.

        Raises:
            VerificationFailed: It does not, by its numbers or by its own label; or as `compare`.
            ServerFailure: The server did not answer.
        """
        # An adapter has a name of its own in the cache, and nothing was emptied for it.
        comparison = self._compare(expectation, served_name, updated=served_name is None)
        if not comparison.matches:
            remedy = CACHE_REMEDY if comparison.verdict is Verdict.STALE_CACHE else None
            raise self._failed(comparison.describe(), comparison=comparison, remedy=remedy)
        if served_name is not None:  # an adapter is labelled when it is activated, after the proof
            return comparison
        label = self._server.weight_version()
        if label is not None and label != str(expectation.version):
            raise self._failed(
                f"the log-probs agree, but the server labels its weights {label!r}; does another trainer "
                "publish to it?"
            )
        return comparison

    def _compare(self, expectation: Expectation, served_name: str | None, *, updated: bool) -> Comparison:
        said = [
            self._next_token(prompt, row, served_name=served_name)
            for prompt, row in zip(self._probes.prompts, expectation.scores.next_tokens, strict=True)
        ]
        next_tokens = tuple(each.logprobs for each in said)
        texts = self._server.score(self._probes.texts, served_name=served_name)
        comparison = compare(
            texts,
            expectation.scores.texts,
            tolerance=expectation.tolerance,
            baseline=self._proven_texts,
            usual=self._usual_difference(),
        )
        if said:
            generated = compare_next_tokens(
                next_tokens,
                expectation.scores.next_tokens,
                tolerance=expectation.tolerance,
                proven=self._proven_generation,
            )
            comparison = _together(
                comparison, generated, cached_tokens=said[0].cached_tokens if updated else None
            )
        logger.info("%s: version %d: %s", self._server.url, expectation.version, comparison.describe())
        self._remember_difference(comparison, updated=updated)
        if comparison.matches:
            self._check_kind(expectation, served_name)
            comparison = replace(comparison, logprob_kind=self.logprob_kind)
        # Where old and new could not be told apart the old baseline stays: against it the movement adds up.
        if comparison.matches and (self._proven_texts is None or comparison.distinguishable):
            scores = expectation.scores
            self._proven_texts = Baseline(expected=scores.texts, served=texts)
            self._proven_generation = ProvenGeneration(expected=scores.next_tokens, served=next_tokens)
        return comparison

    def _usual_difference(self) -> float | None:
        """Return the mean error of this server when it has the right weights; None before that is known."""
        return fmean(self._differences) if self._differences else self._first_difference

    def _remember_difference(self, comparison: Comparison, *, updated: bool) -> None:
        if comparison.matches:
            self._differences.append(comparison.mean_difference)
        elif not self._differences and not updated and math.isfinite(comparison.mean_difference):
            # Before the first publish: what a server that loaded the starting weights by itself is off.
            # If it holds other weights this is large, and the first bound is the tolerance, as without it.
            self._first_difference = comparison.mean_difference

    def _next_token(self, prompt: list[int], row: Sequence[float], **how: Any) -> NextToken:
        """Ask for the token after a prompt, of which the trainer's own log-probs are `row`.

        Raises:
            VerificationFailed: What the server says can be of no token of this vocabulary.
        """
        said = self._server.next_token(prompt, **how)
        for token, logprob in said.logprobs.items():
            if not (0 <= token < len(row) and is_logprob(logprob)):
                raise self._failed(
                    f"the server gives token {token} the log-prob {logprob}; the policy has "
                    f"{len(row)} tokens",
                    remedy="see that the server runs the model that is trained",
                )
        return said

    def _check_kind(self, expectation: Expectation, served_name: str | None) -> None:
        """Ask once whether log-probs are raw or scaled, and say so where it matters."""
        if self.logprob_kind is not None or not expectation.scores.next_tokens:
            return
        prompt, row = self._probes.prompts[-1], expectation.scores.next_tokens[-1]
        said = self._next_token(prompt, row, temperature=ASKED_TEMPERATURE, served_name=served_name)
        kind = logprob_kind(
            said.logprobs, row, temperature=ASKED_TEMPERATURE, tolerance=expectation.tolerance
        )
        found = f"at temperatures other than 1 the server's log-probs are {kind}"
        if self._logprobs.required not in ("any", kind.value):
            raise self._failed(
                f"{found}, and publish.logprobs asks for {self._logprobs.required} ones", remedy=KIND_REMEDY
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

    def _failed(self, reason: str, **more: Any) -> ServerFailure:
        return self._server.failure(Phase.VERIFY, reason, VerificationFailed, **more)


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
    """Combine the verdicts on scored and on generated tokens."""
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

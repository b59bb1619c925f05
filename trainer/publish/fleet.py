"""Publishes to all inference servers of a run, tracks their versions, and handles those that fail."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus

from atropos_client.backoff import Backoff
from atropos_client.clock import running_time
from trainer.config import PublishSettings
from trainer.publish.errors import ServerFailure
from trainer.publish.interfaces import InferenceServer, StagedWeights, WeightTransport
from trainer.publish.procedure import publish_to_server
from trainer.publish.report import PublishFailed, ServerOutcome
from trainer.publish.verification.verifier import Expectation, ServerVerifier

logger = logging.getLogger(__name__)

MAX_VERIFICATION_FAILURES = 3
"""A server that serves something else after the third loading will not change its mind."""

FIRST_WAIT, LONGEST_WAIT = 1.0, 10.0
"""Seconds between two attempts at a publish, until `publish.retry_seconds` are over."""

PASSING_STATUSES = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS})
"""The statuses below 500 that another attempt may not meet again."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Holds one version, ready for any server, now or when it comes back."""

    staged: StagedWeights
    expectation: Expectation | None
    """What a server that has it should say. None: not to be verified."""

    @property
    def version(self) -> int:
        """The policy version."""
        return self.staged.version


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """Reports how far a version got."""

    outcomes: tuple[ServerOutcome, ...]
    """The servers that have it."""
    lost: tuple[ServerOutcome, ...]
    """The servers that the run goes on without."""
    attempts: int


class Member:
    """Tracks one server. Used from one thread at a time."""

    def __init__(self, server: InferenceServer, verifier: ServerVerifier) -> None:
        self.server = server
        self.verifier = verifier
        self.version: int | None = None
        """The version that it has loaded; None where that is not known."""
        self.connected = False
        self.reachable = True
        self.lost: ServerOutcome | None = None
        """Why the run goes on without it; None if it does not."""


class Fleet:
    """Publishes to all servers at once, and keeps them on the current version between publishes.

    Args:
        servers: The servers, each with its verifier.
        transport: How weights get into them.
        settings: Section `publish` of the configuration.
        cancelled: Set when nobody waits for the result any more: ends the waits between attempts.
    """

    def __init__(
        self,
        servers: Iterable[tuple[InferenceServer, ServerVerifier]],
        transport: WeightTransport,
        settings: PublishSettings,
        *,
        cancelled: threading.Event,
    ) -> None:
        self._members = [Member(server, verifier) for server, verifier in servers]
        self._transport = transport
        self._settings = settings
        self._cancelled = cancelled

    @property
    def servers(self) -> list[InferenceServer]:
        """All of them, the lost ones included."""
        return [member.server for member in self._members]

    @property
    def oldest_version(self) -> int | None:
        """The oldest version that any server may serve; None where one is not known."""
        versions = [member.version for member in self._members]
        known = [version for version in versions if version is not None]
        return min(known) if len(known) == len(versions) else None

    def loaded_version(self) -> int | None:
        """The oldest version among the servers that the run counts on; None before the first is known."""
        versions = [member.version for member in self._members if member.lost is None]
        known = [version for version in versions if version is not None]
        return min(known) if known and len(known) == len(versions) else None

    def make_ready(self, version: int) -> None:
        """Wait for every server, resume one that was left paused, and shake hands.

        Raises:
            ServerFailure: There is one server, and it is not ready.
            PublishFailed: One of several is not.
        """
        self._raise_any(version, self._for_all(self._members, self._make_ready))

    def check_served(self, expectation: Expectation) -> list[ServerOutcome]:
        """Ask whether every server serves a version already; label those that do.

        Raises:
            ServerFailure: As `make_ready`: a server did not answer.
            PublishFailed: As `make_ready`.
        """
        outcomes = self._for_all(self._members, lambda member: self._check_served(member, expectation))
        self._raise_any(expectation.version, outcomes)
        return outcomes

    def bring(self, job: Job, *, patient: bool) -> Delivery:
        """Publish a version to every server that the run counts on, as `publish.on_failure` says.

        Args:
            job: The version.
            patient: Whether `publish.on_failure` applies; without, the first failure ends it.

        Raises:
            ServerFailure: There is one server, and one phase failed.
            PublishFailed: Any other failure; `.outcomes` has what happened at every server.
        """
        policy = self._settings.on_failure if patient else "abort"
        deadline = running_time() + self._settings.retry_seconds
        pending = [member for member in self._members if member.lost is None]
        hopeless: list[Member] = []
        done: dict[str, ServerOutcome] = {}
        disproved: Counter[str] = Counter()  # a server that was down at other attempts has not been judged
        waits = Backoff(first=FIRST_WAIT, longest=LONGEST_WAIT)
        attempt = 0
        while True:
            attempt += 1
            outcomes = self._for_all(pending, lambda member: self.publish_to(member, job))
            done |= {outcome.server: outcome for outcome in outcomes}
            failed = [member for member in pending if done[member.server.url].errors]
            disproved.update(outcome.server for outcome in outcomes if outcome.is_disproved)
            pending = [
                member
                for member in failed
                if may_help(
                    done[member.server.url].errors, verification_failures=disproved[member.server.url]
                )
            ]
            hopeless += [member for member in failed if member not in pending]
            wait = waits.next()
            left = deadline - running_time()
            given_up = policy == "abort" or (policy == "retry_until" and bool(hopeless))
            if not pending or given_up or wait > left or self._cancelled.is_set():
                break
            _announce_retry(job, [done[member.server.url] for member in pending], wait=wait, left=left)
            self._cancelled.wait(wait)
        self._settle_failures(job, pending + hopeless, done, policy=policy)
        counted = [member.server.url for member in self._members if member.lost is None]
        return Delivery(
            outcomes=tuple(done[url] for url in counted if url in done), lost=self._lost(), attempts=attempt
        )

    def publish_to(self, member: Member, job: Job) -> ServerOutcome:
        """Publish a version to one server, shaking hands first where that is due."""

        def loaded() -> None:
            member.version = job.version

        started = running_time()
        member.server.name_in_messages(job.version)
        try:
            if not member.connected:
                # After a resume that failed: what a paused server is asked waits, and is answered too late.
                if member.server.is_paused():
                    member.server.resume()
                self._transport.connect(member.server)
                member.connected = True
        except ServerFailure as error:
            return ServerOutcome(server=member.server.url, errors=(error,))
        member.version = None
        outcome = publish_to_server(
            member.server,
            self._transport,
            job.staged,
            verifier=member.verifier,
            expectation=job.expectation,
            on_loaded=loaded,
        )
        if outcome.errors:
            member.connected = False
            logger.debug("%s: gave up after %.1f s", member.server.url, running_time() - started)
        else:
            member.reachable = True
        return outcome

    def out_of_date(self, job: Job) -> list[Member]:
        """Find servers that are back, or that no longer show the current version: restarted, as a rule."""
        return [member for member in self._members if self._is_out_of_date(member, job)]

    def repair(self, member: Member, job: Job) -> bool:
        """Bring the current version to one server again; a failure is logged, and left to the next look."""
        logger.warning(
            "%s does not serve version %d any more, or is back after a failure: publishing it again",
            member.server.url,
            job.version,
        )
        member.connected = False
        outcome = self.publish_to(member, job)
        if outcome.errors:
            member.reachable = False
            logger.warning("version %d is still not served: %s", job.version, outcome.errors[0])
            return False
        member.lost = None
        logger.info("%s serves version %d again", member.server.url, job.version)
        return True

    def close(self) -> None:
        """Leave process groups and close the connections."""
        self._transport.close(self.servers)
        for member in self._members:
            member.server.close()

    def _make_ready(self, member: Member) -> ServerOutcome:
        server = member.server
        errors: tuple[ServerFailure, ...] = ()
        try:
            server.wait_until_ready()
            if server.is_paused():
                logger.warning("%s is paused, perhaps by a trainer that died: resuming it", server.url)
                server.resume()
            self._transport.connect(server)
            member.connected = True
        except ServerFailure as error:
            errors = (error,)
        return ServerOutcome(server=server.url, errors=errors)

    def _check_served(self, member: Member, expectation: Expectation) -> ServerOutcome:
        comparison = None
        errors: tuple[ServerFailure, ...] = ()
        member.server.name_in_messages(expectation.version)
        try:
            # What comes under a name of its own is not there yet, whatever the model itself serves.
            if not self._transport.needs_pause(member.server):
                return ServerOutcome(server=member.server.url)
            comparison = member.verifier.compare(expectation)
            if comparison.matches:
                member.server.tag(expectation.version)
                member.version = expectation.version
        except ServerFailure as error:
            errors = (error,)
        return ServerOutcome(server=member.server.url, comparison=comparison, errors=errors)

    def _is_out_of_date(self, member: Member, job: Job) -> bool:
        try:
            served = self._transport.is_served(member.server, job.staged)
        except ServerFailure as error:
            if member.reachable and member.lost is None:
                logger.warning("%s does not answer; waiting for it: %s", member.server.url, error.reason)
            member.reachable = False
            return False
        return not served or not member.reachable or member.lost is not None

    def _for_all(
        self, members: Sequence[Member], action: Callable[[Member], ServerOutcome]
    ) -> list[ServerOutcome]:
        """Run an action for servers at once and wait for all of them."""
        if len(members) <= 1:  # in this thread, so that Ctrl-C ends the wait and still resumes
            return [action(member) for member in members]
        with ThreadPoolExecutor(len(members), thread_name_prefix="publish") as pool:
            return list(pool.map(action, members))

    def _settle_failures(
        self, job: Job, failed: list[Member], done: dict[str, ServerOutcome], *, policy: str
    ) -> None:
        """Raise what failed, or go on without it if that is the policy and a server is left."""
        counted = [member for member in self._members if member.lost is None]
        if policy != "continue_without" or len(failed) == len(counted):
            self._raise_any(job.version, list(done.values()))
        for member in failed:
            member.lost = done[member.server.url]
            member.reachable = False
            logger.error(
                "going on without %s, which may serve old weights: take it away from the environments, or "
                "restart it; it gets the current version when it is back. It failed with: %s",
                member.server.url,
                member.lost.errors[0],
            )

    def _lost(self) -> tuple[ServerOutcome, ...]:
        return tuple(member.lost for member in self._members if member.lost is not None)

    def _raise_any(self, version: int, outcomes: list[ServerOutcome]) -> None:
        failed = [outcome for outcome in outcomes if outcome.errors]
        if len(outcomes) == 1 and failed and len(failed[0].errors) == 1:
            raise failed[0].errors[0]
        if failed:
            raise PublishFailed(version, outcomes) from failed[0].errors[0]


def may_help(errors: Sequence[ServerFailure], *, verification_failures: int) -> bool:
    """Tell whether publishing again can end differently.

    A request that the server does not understand stays misunderstood; a server that is gone, hangs, or is
    busy may be back.

    Args:
        errors: What went wrong at the server this time.
        verification_failures: How often the server has served something else so far, this time included.
    """
    if verification_failures >= MAX_VERIFICATION_FAILURES:
        return False
    statuses = {error.status for error in errors if error.status is not None} - PASSING_STATUSES
    return not any(HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR for status in statuses)


def _announce_retry(job: Job, outcomes: list[ServerOutcome], *, wait: float, left: float) -> None:
    for outcome in outcomes:
        logger.warning(
            "%s Publishing version %d again in %.0f s, for %.0f s more (publish.retry_seconds)",
            outcome.errors[0],
            job.version,
            wait,
            left,
        )

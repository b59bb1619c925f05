"""Publishes to all inference servers of a run, tracks their versions, and handles those that fail."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus

from atropos_client.backoff import Backoff
from atropos_client.clock import running_time
from trainer.config import PublishSettings
from trainer.publish.errors import ServerFailure
from trainer.publish.interfaces import InferenceServer, WeightTransport
from trainer.publish.member import Job, Member
from trainer.publish.report import PublishFailed, PublishReport, ServerOutcome
from trainer.publish.verification.verifier import Expectation, ServerVerifier

logger = logging.getLogger(__name__)

MAX_VERIFICATION_FAILURES = 3
"""A server that serves something else after the third loading will not change its mind."""

FIRST_WAIT, LONGEST_WAIT = 1.0, 10.0
"""Seconds between two attempts at a publish, until `publish.retry_seconds` are over."""

PASSING_STATUSES = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS})
"""The statuses below 500 that another attempt may not meet again."""


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
        self.members = [Member(server, transport, verifier) for server, verifier in servers]
        """All of them, the lost ones included."""
        self._transport = transport
        self._settings = settings
        self._cancelled = cancelled

    def loaded_version(self) -> int | None:
        """The oldest version among the servers that the run counts on; None where one is not known."""
        return _oldest(self._counted())

    def make_ready(self, version: int) -> None:
        """Wait for every server, resume one that was left paused, and shake hands.

        Raises:
            ServerFailure: There is one server, and it is not ready.
            PublishFailed: One of several is not.
        """
        _raise_any(version, self._for_all(self.members, Member.make_ready))

    def check_served(self, expectation: Expectation) -> PublishReport | None:
        """Ask whether every server serves a version already, and label those that do; None: not every one.

        Raises:
            ServerFailure: As `make_ready`: a server did not answer.
            PublishFailed: As `make_ready`.
        """
        outcomes = self._for_all(self.members, lambda member: member.check_served(expectation))
        _raise_any(expectation.version, outcomes)
        if not all(outcome.comparison is not None and outcome.comparison.matches for outcome in outcomes):
            return None
        return PublishReport(
            version=expectation.version,
            already_served=True,
            verified=True,
            servers=tuple(outcomes),
            oldest_version=_oldest(self.members),
        )

    def bring(self, job: Job, *, patient: bool) -> PublishReport:
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
        pending = self._counted()
        hopeless: list[Member] = []
        done: dict[Member, ServerOutcome] = {}
        disproved: Counter[Member] = Counter()  # a server that was down at other attempts has not been judged
        waits = Backoff(first=FIRST_WAIT, longest=LONGEST_WAIT)
        attempt = 0
        while True:
            attempt += 1
            outcomes = self._for_all(pending, lambda member: member.publish(job))
            done |= zip(pending, outcomes, strict=True)
            disproved.update(member for member in pending if done[member].is_disproved)
            failed = [member for member in pending if done[member].errors]
            pending = [
                member
                for member in failed
                if may_help(done[member].errors, verification_failures=disproved[member])
            ]
            hopeless += [member for member in failed if member not in pending]
            wait = waits.next()
            left = deadline - running_time()
            given_up = policy == "abort" or (policy == "retry_until" and bool(hopeless))
            if not pending or given_up or wait > left or self._cancelled.is_set():
                break
            for member in pending:
                logger.warning(
                    "%s Publishing version %d again in %.0f s, for %.0f s more (publish.retry_seconds)",
                    done[member].errors[0],
                    job.version,
                    wait,
                    left,
                )
            self._cancelled.wait(wait)
        self._settle_failures(job, pending + hopeless, done, policy=policy)
        return PublishReport(
            version=job.version,
            verified=job.expectation is not None,
            attempts=attempt,
            weight_bytes=job.staged.weight_bytes,
            servers=tuple(done[member] for member in self._counted()),
            lost=tuple(member.lost for member in self.members if member.lost is not None),
            oldest_version=_oldest(self.members),
        )

    def close(self) -> None:
        """Leave process groups and close the connections."""
        self._transport.close([member.server for member in self.members])
        for member in self.members:
            member.server.close()

    def _counted(self) -> list[Member]:
        return [member for member in self.members if member.lost is None]

    def _for_all(
        self, members: Sequence[Member], action: Callable[[Member], ServerOutcome]
    ) -> list[ServerOutcome]:
        """Run an action for servers at once and wait for all of them."""
        if len(members) <= 1:  # in this thread, so that Ctrl-C ends the wait and still resumes
            return [action(member) for member in members]
        with ThreadPoolExecutor(len(members), thread_name_prefix="publish") as pool:
            return list(pool.map(action, members))

    def _settle_failures(
        self, job: Job, failed: list[Member], done: dict[Member, ServerOutcome], *, policy: str
    ) -> None:
        """Raise what failed, or go on without it if that is the policy and a server is left."""
        if policy != "continue_without" or len(failed) == len(self._counted()):
            _raise_any(job.version, list(done.values()))
        for member in failed:
            member.give_up(done[member])
            logger.error(
                "going on without %s, which may serve old weights: take it away from the environments, or "
                "restart it; it gets the current version when it is back. It failed with: %s",
                member.server.url,
                done[member].errors[0],
            )


def _oldest(members: Iterable[Member]) -> int | None:
    """The oldest version that any of them may serve; None where one is not known."""
    known: list[int] = []
    for version in (member.version for member in members):
        if version is None:
            return None
        known.append(version)
    return min(known, default=None)


def _raise_any(version: int, outcomes: list[ServerOutcome]) -> None:
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

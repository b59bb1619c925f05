"""Explains in one line why there is no batch yet, and who is late.

A run that waits must say for whom. `explain_wait` is a pure function of what is known, `ask_environments`
asks the API for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Final

from atropos_client._client import AtroposClient
from atropos_client.errors import AtroposClientError, ErrorStatus
from schemas import EnvironmentStatus, StatusReply, count_of

_MOST_ASKED: Final = 64  # environments; a loop over numbers ends somewhere
_ALL: Final = 0.999  # of the weights, but for rounding


@dataclass(frozen=True, kw_only=True)
class EnvironmentFacts:
    """Holds what the API knows of the environments. It does not know whether they still live."""

    registered: int
    """Number of environments registered since the trainer has."""
    without_groups: tuple[int, ...]
    """Numbers of those that have no group in the queue."""
    largest_group: int
    """Sequences of the largest group in the queue; 1 if it is empty."""
    latest_group: int | None
    """Sequences of the group that reached the queue last. None: none ever did, or it cannot be read."""
    reserved: bool
    """Whether an environment asks for a share of every batch (min_batch_allocation)."""


def ask_environments(api: AtroposClient) -> EnvironmentFacts | None:
    """Ask the API for every environment, and for the latest group; None if it does not answer."""
    found: list[EnvironmentStatus] = []
    latest = None
    try:
        # Their weights add up to 1: a number too many is asked for only if nobody has registered, because the
        # API writes a traceback into its log then.
        while len(found) < _MOST_ASKED and sum(each.env_weight for each in found) < _ALL:
            found.append(api.environment_status(len(found)))
    except ErrorStatus:
        pass  # how it answers for a number that nobody has
    except AtroposClientError:
        return None
    with contextlib.suppress(AtroposClientError):  # a group that is not valid
        latest = api.latest_example()
    return EnvironmentFacts(
        registered=len(found),
        without_groups=tuple(number for number, each in enumerate(found) if each.self_queue_size == 0),
        largest_group=max((each.max_group_size for each in found), default=1),
        latest_group=latest.sequence_count if latest is not None else None,
        reserved=any(each.unallocated_fraction < 1 for each in found),
    )


@dataclass(frozen=True, kw_only=True)
class WaitFacts:
    """Holds what is known about a wait for data."""

    url: str
    """Address of the API, without credentials."""
    waited: float
    """Seconds since the last batch, or since the start."""
    batch_size: int
    """Sequences that a batch needs."""
    max_token_len: int
    """Tokens from which on environments drop a group for one of its sequences."""
    batches: int
    """Batches that have come so far."""
    group_size: float | None
    """Sequences per group in the last batch. None: none came yet."""
    in_flight: float | None
    """Seconds that the current ``GET /batch`` has been waiting for its reply. None: none is under way."""
    trouble: str | None
    """Failure of the last request. None: it did not fail."""
    status: StatusReply | None
    """The API's own numbers. None: not asked, or no answer."""
    environments: EnvironmentFacts | None = None
    """The API's knowledge of the environments. None: not asked, or no answer."""


def ask_status(api: AtroposClient, facts: WaitFacts) -> WaitFacts:
    """Add to the facts what the API says; where it does not answer they stay as they are."""
    try:
        status, info = api.status(), api.info()
    except AtroposClientError:
        return facts
    if info.registered:  # perhaps by an earlier trainer, whose numbers stay in force
        facts = dataclasses.replace(facts, batch_size=info.batch_size, max_token_len=info.max_token_len)
    return dataclasses.replace(facts, status=status, environments=ask_environments(api))


def explain_wait(facts: WaitFacts) -> str:
    """Say in one line who is late, with numbers and, where there is one, the remedy."""
    since = f"for {facts.waited:.0f} s"
    if facts.trouble is not None:
        return f"no batch {since}: the Atropos API at {facts.url} fails: {facts.trouble}"
    if facts.in_flight is not None and facts.in_flight > 5:
        return (
            f"no batch {since}: the Atropos API at {facts.url} has not answered GET /batch "
            f"for {facts.in_flight:.0f} s (it may be encoding a large batch, or hang)"
        )
    if facts.status is None or facts.environments is None:
        return f"no batch {since}: the Atropos API at {facts.url} did not tell its status"
    if facts.environments.registered == 0 and _sequences(facts, facts.status) < facts.batch_size:
        return _explain_nobody(facts, since)
    latest, largest = facts.environments.latest_group or 1, facts.environments.largest_group
    never_full = why_no_batch_is_full(facts.batch_size, latest, largest)
    if never_full is not None:
        return f"no batch {since}: {never_full}, at {facts.url}"
    line = f"environments are late {since}: {_queue(facts, facts.status)} at {facts.url}"
    if _sequences(facts, facts.status) >= facts.batch_size:
        return line + "; " + _why_enough_is_not(facts.environments)
    if facts.status.queue_size == 0:
        return line + "; " + _why_no_group(facts, facts.status)
    return line


def why_no_batch_is_full(batch_size: int, size: int, largest: int = 1) -> str | None:
    """Say why the API never forms a batch of groups like these; None if it does.

    It packs groups of one size until they have as many sequences as the largest group that waits, and such
    packs until they are exactly a batch.

    Args:
        batch_size: Sequences that a batch needs.
        size: Sequences of a group.
        largest: Sequences of the largest group that waits beside it.
    """
    for each in (size, largest):
        if batch_size % each:
            return (
                f"groups of {each} sequences never make a batch of exactly {batch_size}: set "
                f"atropos.batch_size to a multiple of {each} and restart the API, or the environment's "
                f"group_size to a divisor of {batch_size}"
            )
    if largest > size and largest % size:
        return (
            f"groups of {size} sequences do not fit beside groups of {largest}: let one environment's "
            "group_size be a multiple of the other's"
        )
    return None


def _explain_nobody(facts: WaitFacts, since: str) -> str:
    if facts.batches:
        return (
            f"no batch {since}: no environment is registered any more at {facts.url}: they have ended, or it "
            "was restarted or reset; environments do not register again by themselves: start them again"
        )
    return (
        f"no environment connected {since}: none is registered at {facts.url}; start them, and restart those "
        "that were started before the API"
    )


def _sequences(facts: WaitFacts, status: StatusReply) -> int:
    environments = facts.environments
    size = facts.group_size or (environments.latest_group if environments is not None else None) or 1
    return round(status.queue_size * size)


def _queue(facts: WaitFacts, status: StatusReply) -> str:
    environments = facts.environments
    registered = f", {environments.registered} registered" if environments is not None else ""
    return (
        f"queue {_sequences(facts, status)}/{facts.batch_size} sequences "
        f"({count_of(status.queue_size, 'group')}{registered})"
    )


def _why_enough_is_not(environments: EnvironmentFacts) -> str:
    if environments.reserved and environments.without_groups:
        numbers = ", ".join(map(str, environments.without_groups))
        return (
            "enough, but an environment has a min_batch_allocation, no batch is formed without its share, "
            f"and nothing waits of environment {numbers}: look at its log"
        )
    return (
        "enough, but the API only serves exactly full batches: make the batch size a multiple of every "
        "environment's group size, and the shares of min_batch_allocation multiples of it"
    )


def _why_no_group(facts: WaitFacts, status: StatusReply) -> str:
    """Why environments that are there send nothing: the API does not know, so what to look for."""
    dropped = (
        "if this goes on, look at their logs: they drop a group whose rollouts raise, whose scores are all "
        f"equal, or that has a sequence of {facts.max_token_len} tokens or more"
    )
    if not facts.batches:
        return "none has sent a group yet; " + dropped
    return (
        f"{dropped}; and they end by themselves when total_steps batches were formed (1000 unless set, "
        f"{status.current_step} by now): start them again with --env.total_steps -1"
    )

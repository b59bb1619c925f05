"""What to do about a server that did not take a version: pure decisions, no waiting, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus

from trainer.publish.errors import ServerFailure

MAX_VERIFICATION_FAILURES = 3
"""A server that serves something else after the third loading will not change its mind."""

MAX_WAIT = 10.0
"""Seconds between two attempts, at most: a server that starts takes a minute, so this costs little."""


def may_help(errors: Sequence[ServerFailure], *, verification_failures: int) -> bool:
    """Whether publishing again can end differently.

    A request that the server does not understand stays misunderstood; a server that is gone, hangs, or is
    busy may be back.

    Args:
        errors: What went wrong at the server this time.
        verification_failures: How often the server has served something else so far, this time included.
    """
    if verification_failures >= MAX_VERIFICATION_FAILURES:
        return False
    return not any(error.status is not None and _is_final(error.status) for error in errors)


def wait_before(attempt: int) -> float:
    """Seconds to wait before attempt number `attempt` + 1: 1, 2, 4, 8, then `MAX_WAIT`."""
    return float(min(2 ** min(attempt - 1, 8), MAX_WAIT))


def _is_final(status: int) -> bool:
    passing = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS}
    return HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR and status not in passing

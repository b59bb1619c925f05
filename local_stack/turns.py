"""Sampling on-policy: so many groups for each version of the weights, then wait for the next version.

An environment that samples ahead gives the trainer rollouts of weights that are one or more steps old. With
spare hardware that hides latency; where inference and training share two cores it hides nothing, and a small
model with a large learning rate learns worse from it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

UNPUBLISHED = "default"
"""Label of the weights that inference servers were started with, until a trainer labels them."""

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1


class Turns:
    """Hands out turns to sample, `per_version` for each version of the weights.

    Args:
        read_version: The version that is served now; None if the server does not tell, then nobody waits.
            Weights that no trainer has labelled yet, at the start or after the server was restarted, get no
            turns: they may be far from the newest.
        per_version: Turns for each version: the groups of one training batch.
        patience: Seconds after which new turns are handed out although the version stayed: the trainer may
            have skipped the batch for a reason that is not seen here.
    """

    def __init__(
        self, read_version: Callable[[], Awaitable[str | None]], *, per_version: int, patience: float = 90.0
    ) -> None:
        self._read_version = read_version
        self._per_version = per_version
        self._patience = patience
        self._version: str | None = None
        self._left = 0
        self._flat = 0
        self._lock = asyncio.Lock()

    async def take(self) -> str | None:
        """Wait for a turn; returns the version that it is for."""
        async with self._lock:  # one at a time asks the server
            since = time.monotonic()
            while True:
                version = await self._read_version()
                if version is None:
                    return None
                if version != self._version:
                    self._version = version
                    self._refill(0 if version == UNPUBLISHED else self._per_version)
                elif self._flat >= self._per_version:
                    logger.info("no group of version %s has a spread in its scores: sampling again", version)
                    self._refill(self._per_version)
                elif not self._left and time.monotonic() - since > self._patience:
                    logger.warning("still version %s after %.0f s: sampling again", version, self._patience)
                    self._refill(self._per_version)
                if self._left:
                    self._left -= 1
                    return version
                await asyncio.sleep(_POLL_SECONDS)

    def give_back(self, version: str | None) -> None:
        """Return a turn for which no group was sent."""
        if version is not None and version == self._version:
            self._left += 1

    def note_flat(self, version: str | None) -> None:
        """Count a group that was sent although its scores are all equal.

        A batch of such groups has no advantage that differs from 0. The trainer skips it and makes no new
        version, so `take` hands out new turns for the old one at once.
        """
        if version is not None and version == self._version:
            self._flat += 1

    def _refill(self, turns: int) -> None:
        self._left, self._flat = turns, 0

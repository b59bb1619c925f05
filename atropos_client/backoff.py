"""Waits that double, with jitter: between polls, sendings and starts of a process."""

from __future__ import annotations

import random


class Backoff:
    """Pauses that double from `first` to `longest` seconds.

    Half of every pause is random, so that several trainers or restarts do not poll in step.
    """

    def __init__(self, *, first: float, longest: float, rng: random.Random | None = None) -> None:
        """Start at the first pause.

        Args:
            first: Seconds of the first pause, before jitter.
            longest: Seconds that no pause exceeds.
            rng: Source of the jitter. None: a fresh one.
        """
        if not 0 < first <= longest:
            raise ValueError(f"pauses must satisfy 0 < first <= longest, found {first} and {longest}")
        self._first = first
        self._longest = longest
        self._next = first
        self._rng = rng or random.Random()  # noqa: S311 - jitter, not a secret

    def next(self) -> float:
        """Return the coming pause in seconds, and double the one after it."""
        full = self._next
        self._next = min(self._longest, 2 * full)
        return full * self._rng.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Begin with the first pause again."""
        self._next = self._first

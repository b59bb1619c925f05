"""Gives batches of a list that was recorded."""

from __future__ import annotations

from collections.abc import Iterable

from trainer.sources.incoming import EndOfBatches, IncomingBatch, read_incoming


class RecordedSource:
    """Batches that were recorded earlier, in order."""

    party = "recorded batches"

    def __init__(self, bodies: Iterable[bytes], *, served_version: int = 0) -> None:
        self._bodies = iter(bodies)
        self._served_version = served_version

    def start(self) -> None:
        """Nothing to start."""

    def get(self, timeout: float) -> IncomingBatch | None:
        """Return the next batch."""
        del timeout
        body = next(self._bodies, None)
        if body is None:
            raise EndOfBatches
        return read_incoming(body, served_version=self._served_version)

    def describe_wait(self) -> str:
        """Recorded batches are never late."""
        return "recorded batches"

    def counters(self) -> dict[str, int]:
        """Nothing is counted."""
        return {}

    def stop(self) -> list[bytes]:
        """Nothing to stop, nothing fetched early."""
        return []

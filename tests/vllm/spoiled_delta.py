"""The worker extension, with a method that makes its next writing fail half-way; loaded by a test."""

from __future__ import annotations

from typing import Any

import torch
from atropos_delta import AtroposDelta  # type: ignore[import-not-found] # by vLLM's PYTHONPATH


class SpoiledDelta(AtroposDelta):  # type: ignore[misc] # as above
    """Writes as the extension does, until it is told to fail."""

    def atropos_delta_spoil(self: Any) -> None:
        """Let the last of the changes that are ready go to a place that is not there."""
        self._atropos_receiver._ready.changes[-1].places = torch.tensor([1 << 40])

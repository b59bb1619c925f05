"""What an environment says to the Atropos API; the product only listens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx

from schemas import ScoredGroup

ACCEPTED = "success"
"""The status of a registration, which before the trainer's first poll asks to wait."""


def register_environment(url: str, **fields: Any) -> dict[str, Any]:
    """Register one whose groups have two sequences, unless `fields` say otherwise; returns the reply."""
    body = {"max_token_length": 4096, "desired_name": "sums", "weight": 1.0, "group_size": 2, **fields}
    reply: dict[str, Any] = httpx.post(f"{url}/register-env", json=body).raise_for_status().json()
    return reply


def push_groups(url: str, groups: Sequence[ScoredGroup]) -> None:
    """Hand groups to the queue, all at once."""
    body = [group.model_dump(mode="json", exclude_none=True) for group in groups]
    httpx.post(f"{url}/scored_data_list", json=body).raise_for_status()

"""By what a group of rollouts is known again wherever it turns up."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any


def names_of(groups: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """A name for each group: SHA-256 of its tokens, which are drawn at random and passed on as they are."""
    return tuple(hashlib.sha256(json.dumps(group["tokens"]).encode()).hexdigest() for group in groups)

"""What training relies on in a group that was accepted, checked one value at a time."""

from __future__ import annotations

import json
import math
from typing import Any

from schemas import IGNORE_INDEX, BatchReply, ScoredGroup


def check_reply(reply: BatchReply) -> None:
    """Every group was either accepted, and is sound, or rejected, with a reason that a log can carry."""
    assert len(reply.groups) + len(reply.rejected) == len(reply.batch or [])
    for group in reply.groups:
        check_group(group)
    for rejected in reply.rejected:
        assert rejected.reason
        assert "\n" not in rejected.reason
        json.dumps({"raw": rejected.raw, "env_id": rejected.env_id, "reason": rejected.reason})


def check_group(group: ScoredGroup) -> None:
    """Equal shapes, finite numbers, masks of -100 or the token, log-probs of at most 0 where trained."""
    lengths = [len(tokens) for tokens in group.tokens]
    assert lengths
    assert min(lengths) >= 1
    assert all(type(token) is int and 0 <= token < 2**31 for row in group.tokens for token in row)
    assert [len(mask) for mask in group.masks] == lengths
    for tokens, mask in zip(group.tokens, group.masks, strict=True):
        assert all(entry in (IGNORE_INDEX, token) for token, entry in zip(tokens, mask, strict=True))
    assert len(group.scores) == len(lengths)
    assert all(_fits_float32(score) for score in group.scores)
    assert group.overrides is None or len(group.overrides) == len(lengths)
    for rows in (group.advantages, group.inference_logprobs, group.ref_logprobs):
        if rows is not None:
            assert [len(row) for row in rows] == lengths
            assert all(_fits_float32(value) for row in rows for value in row)
    for rows in (group.inference_logprobs, group.ref_logprobs):
        for row, mask in zip(rows or (), group.masks, strict=False):
            assert all(value <= 1e-6 for value, entry in zip(row, mask, strict=True) if entry != IGNORE_INDEX)
    json.dumps(group.model_dump(mode="json"))


def _fits_float32(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and abs(value) <= 3.4028234663852886e38

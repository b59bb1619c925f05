"""The wire, nothing else: pydantic models of the Atropos API and of the inference servers' APIs.

Imports pydantic and the standard library only, so that any process can read the wire without loading torch.
Here are the names of the Atropos API; those of the servers are in `schemas.inference` and `schemas.sglang`.
"""

from __future__ import annotations

from schemas._api import (
    EnvironmentIdentifier,
    EnvironmentStatus,
    InfoReply,
    Registration,
    StatusReply,
)
from schemas._batch import MAX_GROUPS, BatchReply, BatchState, RejectedGroup
from schemas._flat import IGNORE_INDEX, FlatGroup
from schemas._group import LOGPROB_SLACK, ScoredGroup
from schemas._reading import MAX_CONTAINERS, read_batch
from schemas._text import count_of, printable
from schemas._wire import WireModel, first_problem

__all__ = [
    "IGNORE_INDEX",
    "LOGPROB_SLACK",
    "MAX_CONTAINERS",
    "MAX_GROUPS",
    "BatchReply",
    "BatchState",
    "EnvironmentIdentifier",
    "EnvironmentStatus",
    "FlatGroup",
    "InfoReply",
    "Registration",
    "RejectedGroup",
    "ScoredGroup",
    "StatusReply",
    "WireModel",
    "count_of",
    "first_problem",
    "printable",
    "read_batch",
]

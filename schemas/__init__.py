"""The wire, nothing else: pydantic models of the Atropos API and of the inference servers' APIs.

Imports pydantic and the standard library only, so that any process can read the wire without loading torch.
"""

from __future__ import annotations

from schemas._api import (
    DisconnectReply,
    EnvironmentIdentifier,
    EnvironmentRegistration,
    EnvironmentRegistrationReply,
    EnvironmentStatus,
    InfoReply,
    Registration,
    RegistrationReply,
    ScoredDataListReply,
    ScoredDataReply,
    StatusReply,
    WandbInfoReply,
)
from schemas._batch import BatchReply, BatchState, RejectedGroup
from schemas._group import IGNORE_INDEX, LOGPROB_SLACK, ScoredGroup
from schemas._wire import WireModel, first_problem

__all__ = [
    "IGNORE_INDEX",
    "LOGPROB_SLACK",
    "BatchReply",
    "BatchState",
    "DisconnectReply",
    "EnvironmentIdentifier",
    "EnvironmentRegistration",
    "EnvironmentRegistrationReply",
    "EnvironmentStatus",
    "InfoReply",
    "Registration",
    "RegistrationReply",
    "RejectedGroup",
    "ScoredDataListReply",
    "ScoredDataReply",
    "ScoredGroup",
    "StatusReply",
    "WandbInfoReply",
    "WireModel",
    "first_problem",
]

"""Errors of the embedded server.

InferenceError
├── RequestRefused (ValueError)        the request is at fault; names the field
│   ├── UnknownModel                   it names a model that is not served
│   └── CheckpointMismatch             weights that do not fit the served model; the old ones stay
├── UnsupportedModel (ValueError)      a model that cannot be batched, found at start
└── EngineFailure (RuntimeError)       a step failed, or the engine has stopped
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_MOST_ERRORS_REPORTED = 5


class InferenceError(Exception):
    """Base class of everything that the embedded server raises on purpose; names the field at fault."""

    status = 500
    """The HTTP status to answer with."""
    kind = "InternalServerError"
    """The class of error as vLLM names it."""

    def __init__(self, message: str, *, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class RequestRefused(InferenceError, ValueError):  # noqa: N818 - reads as the event that it is
    """The request asks for something impossible or unsupported."""

    status = 400
    kind = "BadRequestError"


class UnknownModel(RequestRefused):
    """The request names a model that is not served."""

    status = 404
    kind = "NotFoundError"


class CheckpointMismatch(RequestRefused):
    """A checkpoint whose tensors are not those of the served model; nothing of it was applied."""


class UnsupportedModel(InferenceError, ValueError):  # noqa: N818 - reads as the event that it is
    """A model that gives other results in a padded batch than alone, or that is too short."""


class EngineFailure(InferenceError, RuntimeError):  # noqa: N818 - reads as the event that it is
    """The engine could not finish a request through no fault of the request."""


def validation_message(details: Sequence[Mapping[str, Any]]) -> str:
    """Put pydantic's errors into one line."""
    lines = [f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in details]
    if len(lines) > _MOST_ERRORS_REPORTED:
        lines[_MOST_ERRORS_REPORTED:] = [f"and {len(lines) - _MOST_ERRORS_REPORTED} more"]
    return f"{len(details)} validation error(s): " + "; ".join(lines)

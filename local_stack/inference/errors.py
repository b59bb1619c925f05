"""What can go wrong in the embedded server, as one tree.

::

    InferenceError (Exception)
    ├── RequestRefused (ValueError)        the request is at fault; carries the HTTP status and the field
    ├── CheckpointMismatch (ValueError)    weights that do not fit the served model; the old ones stay
    ├── UnsupportedModel (ValueError)      a model that the batched forward cannot run, found at start
    └── EngineFailure (RuntimeError)       a step failed, or the engine has stopped
"""

from __future__ import annotations


class InferenceError(Exception):
    """Base class of everything that the embedded server raises on purpose."""


class RequestRefused(InferenceError, ValueError):  # noqa: N818 - reads as the event that it is
    """The request asks for something impossible or unsupported.

    Attributes:
        parameter: The field at fault, or None.
        status: The HTTP status to answer with.
        kind: The class of error as vLLM names it.
    """

    def __init__(
        self,
        message: str,
        *,
        parameter: str | None = None,
        status: int = 400,
        kind: str = "BadRequestError",
    ) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.status = status
        self.kind = kind


class CheckpointMismatch(InferenceError, ValueError):  # noqa: N818 - reads as the event that it is
    """A checkpoint whose tensors are not those of the served model; nothing of it was applied."""


class UnsupportedModel(InferenceError, ValueError):  # noqa: N818 - reads as the event that it is
    """A model whose own forward and the batched forward do not agree, or that lacks what the latter needs."""


class EngineFailure(InferenceError, RuntimeError):  # noqa: N818 - reads as the event that it is
    """The engine could not finish a request through no fault of the request."""

"""Errors of publishing, as one tree.

::

    PublishError (trainer.errors.TrainerError)
    ├── StagingFailed (OSError)              the new weights could not be written
    ├── ServerFailure                        one phase failed at one server
    │   ├── ServerNotReady                   it did not become healthy, or lacks what we need
    │   ├── ConnectFailed                    it did not join the transfer's process group
    │   ├── PauseFailed
    │   ├── LoadFailed
    │   ├── CacheResetFailed
    │   ├── TagFailed
    │   ├── ResumeFailed                     it may still be paused: environments would wait forever
    │   ├── ScoringFailed                    it did not score the probes
    │   ├── ActivationFailed                 the proven weights are loaded, but not yet what environments get
    │   ├── PhaseDeadlineExceeded (DeadlineExceeded, TimeoutError)    any phase; `.phase` says which
    │   └── verification.verifier.VerificationFailed    it does not serve the weights that were published
    └── report.PublishFailed                 several of the above; `.outcomes` has every server's

Every `ServerFailure` carries the server's URL, the phase, the version, and what the server itself said.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from schemas import printable
from trainer.errors import DeadlineExceeded, TrainerError

MAX_SERVER_TEXT = 600
"""Characters of a server's own text that a message quotes; enough for its reason, not for its traceback."""


class Phase(StrEnum):
    """Names the steps at one server, in their order."""

    READY = "ready"
    CONNECT = "connect"
    PAUSE = "pause"
    LOAD = "load"
    RESET_CACHES = "reset caches"
    TAG = "tag version"
    RESUME = "resume"
    VERIFY = "verify"
    ACTIVATE = "activate"


class PublishError(TrainerError):
    """New weights are not proven to be served."""


class StagingFailed(PublishError, OSError):  # noqa: N818 - the phases read as events
    """The new weights could not be written; no server was touched."""


class ServerFailure(PublishError):  # noqa: N818
    """One phase failed at one server.

    Attributes:
        server: The server's base URL, without credentials.
        phase: The phase that failed.
        version: The policy version that was being published; None before the first.
        reason: What was found, in our words.
        status: The HTTP status, if there was a reply.
        server_text: What the server said, truncated; empty if nothing.
    """

    remedy = "look into the server's log"

    def __init__(
        self,
        reason: str,
        *,
        server: str,
        phase: Phase,
        version: int | None = None,
        status: int | None = None,
        server_text: str = "",
        remedy: str | None = None,
    ) -> None:
        if remedy is not None:
            self.remedy = remedy
        self.server = server
        self.phase = phase
        self.version = version
        self.reason = reason
        self.status = status
        self.server_text = shorten(server_text)
        what = f"version {version}" if version is not None else "the first contact"
        said = f"; the server said: {self.server_text}" if self.server_text else ""
        found = f"{reason}{said}".rstrip(".")
        super().__init__(f"{server}: {phase} failed for {what}: {found}. What to do: {self.remedy}.")

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args, self.__dict__)


def _restore(cls: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    return error


class ServerNotReady(ServerFailure):
    """The server did not become healthy, or does not offer what publishing needs."""

    remedy = (
        "see that the server runs at this URL; vLLM needs VLLM_SERVER_DEV_MODE=1 for the weight routes; "
        "raise publish.ready_timeout if it is only slow to start"
    )


class ConnectFailed(ServerFailure):
    """The server did not join the process group over which weights travel."""

    remedy = (
        "see that the server was started for this transport (docs/engines) and that its workers reach "
        "publish.group_address and publish.group_port; or use publish.transport disk"
    )


class PauseFailed(ServerFailure):
    """The server did not pause; its weights were not touched."""

    remedy = "start vLLM with VLLM_SERVER_DEV_MODE=1; otherwise look into the server's log"


class LoadFailed(ServerFailure):
    """The server did not load the weights; what it serves now is unknown."""

    remedy = (
        "see that the server serves the same architecture and, with publish.transport disk, can read "
        "publish.directory under the same path (as another user only with publish.readable_by); otherwise "
        "look into its log"
    )


class CacheResetFailed(ServerFailure):
    """The prefix cache may still hold blocks that old weights computed."""


class TagFailed(ServerFailure):
    """The server did not take the version's label."""


class ResumeFailed(ServerFailure):
    """The server may still be paused."""

    remedy = "POST /resume to the server by hand, or restart it: until then environments wait for it"


class ScoringFailed(ServerFailure):
    """The server did not score the probe texts."""

    remedy = (
        "verification needs POST /v1/completions with token-id prompts and prompt_logprobs; "
        "see the server's log, or set publish.verify to false to go on without proof"
    )


class PhaseDeadlineExceeded(ServerFailure, DeadlineExceeded):
    """A phase did not end in its time."""

    remedy = "see whether the server hangs; raise the phase's publish.*_timeout if it is only slow"


class ActivationFailed(ServerFailure):
    """The server holds the proven weights, but environments do not sample from them yet."""

    remedy = "see that the server runs our middleware (docs/engines), which takes the current adapter's name"


PHASE_ERRORS: dict[Phase, type[ServerFailure]] = {
    Phase.READY: ServerNotReady,
    Phase.CONNECT: ConnectFailed,
    Phase.PAUSE: PauseFailed,
    Phase.LOAD: LoadFailed,
    Phase.RESET_CACHES: CacheResetFailed,
    Phase.TAG: TagFailed,
    Phase.RESUME: ResumeFailed,
    Phase.VERIFY: ScoringFailed,
    Phase.ACTIVATE: ActivationFailed,
}
"""The error that stands for each phase."""


def shorten(text: str) -> str:
    """Put a server's text on one line of bounded length."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= MAX_SERVER_TEXT else f"{line[:MAX_SERVER_TEXT]}..."

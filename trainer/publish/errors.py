"""Errors of publishing, as one tree.

::

    PublishError (trainer.errors.TrainerError)
    ├── StagingFailed (OSError)              the new weights could not be written
    ├── ServerFailure                        a phase failed at one server; `.phase` says which
    │   ├── PhaseDeadlineExceeded (DeadlineExceeded, TimeoutError)
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


REMEDIES: dict[Phase, str] = {
    Phase.READY: (
        "see that the server runs at this URL; vLLM needs VLLM_SERVER_DEV_MODE=1 for the weight routes; "
        "raise publish.ready_timeout if it is only slow to start"
    ),
    Phase.CONNECT: (
        'start vLLM with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config \'{"backend": "nccl"}\' (or '
        "ipc); see that its workers reach publish.group_address and publish.group_port; or use "
        "publish.transport disk"
    ),
    Phase.PAUSE: "start vLLM with VLLM_SERVER_DEV_MODE=1; otherwise look into the server's log",
    Phase.LOAD: (
        "see that the server serves the same architecture and, with publish.transport disk, can read "
        "publish.directory under the same path (as another user only with publish.readable_by), or with ipc "
        "is on the trainer's GPU and has VLLM_ALLOW_INSECURE_SERIALIZATION=1; otherwise look into its log"
    ),
    Phase.RESUME: "POST /resume to the server by hand, or restart it: until then environments wait for it",
    Phase.VERIFY: (
        "verification needs POST /v1/completions with token-id prompts and prompt_logprobs; "
        "see the server's log, or set publish.verify to false to go on without proof"
    ),
    Phase.ACTIVATE: "see that the server runs our middleware (docs/engines), which takes the adapter's name",
}
"""Advice on a failure of a phase, unless more is known."""


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
        remedy: What to do about it.
    """

    remedy = ""
    """By default that of the phase."""

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
        self.remedy = remedy or self.remedy or REMEDIES.get(phase, "look into the server's log")
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


class PhaseDeadlineExceeded(ServerFailure, DeadlineExceeded):
    """A phase did not end in its time."""

    remedy = "see whether the server hangs; raise the phase's publish.*_timeout if it is only slow"


def shorten(text: str) -> str:
    """Put a server's text on one line of bounded length."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= MAX_SERVER_TEXT else f"{line[:MAX_SERVER_TEXT]}..."

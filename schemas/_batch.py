"""The reply to ``GET /batch``: a batch of groups, "not enough data yet", or "no trainer is registered".

One bad group never spoils the others: each group of the list is either a :class:`ScoredGroup` or a
:class:`RejectedGroup` that says why, in one pass over the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Final, Literal

from pydantic import Field, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from schemas._group import ScoredGroup
from schemas._wire import WireModel, first_problem, quote

BatchState = Literal["ready", "waiting", "unregistered"]
"""Answer of the API to a poll: here is a batch; not enough data yet; register first."""


MAX_GROUPS: Final = 1 << 16
"""Groups in one batch, of which each has at least one sequence. A bound, because `{},` over and over takes
hundreds of times its size in memory."""


@dataclass(frozen=True, kw_only=True)
class RejectedGroup:
    """A group that cannot be trained on, kept whole for quarantine."""

    index: int
    """Position of the group inside its batch, from 0."""
    env_id: int | None
    """Number of the environment that sent it. None: not readable."""
    reason: str
    """One line, for example ``tokens[3] has 17 entries but masks[3] has 16``."""
    raw: Any
    """The parsed JSON value, as it came."""


class Unusable:
    """Second branch of the union below: takes any JSON value that is no valid group, with the reason.

    Only reached for bad groups. The reason is found by validating the parsed value once more, because a union
    does not tell its second branch why the first one failed.
    """

    def __init__(self, raw: Any, reason: str) -> None:
        self.raw = raw
        self.reason = reason

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.explain,
            serialization=core_schema.plain_serializer_function_ser_schema(lambda unusable: unusable.raw),
        )

    @classmethod
    def explain(cls, raw: Any) -> Unusable:
        """Find out why `raw` is no valid group."""
        if isinstance(raw, cls):
            return raw
        if not isinstance(raw, dict):
            return cls(raw, f"a group must be a JSON object, found {quote(raw)}")
        try:
            ScoredGroup.model_validate(raw)
        except ValidationError as error:
            return cls(raw, first_problem(error))
        # Reachable only if JSON and Python validation disagree, which strict mode rules out.
        return cls(raw, "the group is not valid JSON for a scored group")

    def at(self, index: int) -> RejectedGroup:
        """Return the public record of this group."""
        env_id = self.raw.get("env_id") if isinstance(self.raw, dict) else None
        readable = isinstance(env_id, int) and not isinstance(env_id, bool)
        return RejectedGroup(
            index=index, env_id=env_id if readable else None, reason=self.reason, raw=self.raw
        )


class BatchReply(WireModel):
    """Reply of ``GET /batch``. Read it with ``BatchReply.model_validate_json(body)``.

    Raises:
        pydantic.ValidationError: If the body is not JSON or is no batch reply at all. Bad groups inside a
            batch do not raise; they are in `rejected`.
    """

    batch: (
        Annotated[
            list[Annotated[ScoredGroup | Unusable, Field(union_mode="left_to_right")]],
            Field(max_length=MAX_GROUPS),
        ]
        | None
    )
    """The wire field: a list of groups, or null when the server has not enough data. Prefer `groups`."""
    status: str | None = None
    """``"error"`` when no trainer is registered, else absent."""
    message: str | None = None
    """The server's words about `status`."""

    @property
    def state(self) -> BatchState:
        """Whether there is a batch, not yet, or not before a registration."""
        # Data first: whatever else a server says, a batch that came is not thrown away.
        if self.batch:
            return "ready"
        return "unregistered" if self.status == "error" else "waiting"

    @cached_property
    def groups(self) -> list[ScoredGroup]:
        """The groups that can be trained on, in the server's order."""
        return [group for group in self.batch or [] if isinstance(group, ScoredGroup)]

    @cached_property
    def rejected(self) -> list[RejectedGroup]:
        """The groups that cannot be trained on, each with its position and the reason."""
        return [g.at(index) for index, g in enumerate(self.batch or []) if isinstance(g, Unusable)]

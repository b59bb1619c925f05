"""Describes every route of the Atropos API: what to send and how to read the reply. No I/O.

The client and the tests share these; a new route is one function here and one line there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from atropos_client._retry import Resend
from atropos_client.errors import InvalidReply
from schemas import (
    BatchReply,
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
    ScoredGroup,
    StatusReply,
    WandbInfoReply,
    first_problem,
    read_batch,
)

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

_NEAR_AN_END: Final = 1024  # bytes
_BATCH_BEGINS: Final = re.compile(rb'"batch"\s*:\s*\[\s*[^\s\]]')
_GROUPS: TypeAdapter[list[ScoredGroup]] = TypeAdapter(list[ScoredGroup])


@dataclass(frozen=True, kw_only=True)
class Call(Generic[T]):
    """One request and the reading of its reply."""

    method: str
    """HTTP method."""

    path: str
    """Path below the base URL, with its leading slash."""

    parse: Callable[[bytes], T]
    """Turns the decompressed body of a 2xx reply into the result; raises InvalidReply."""

    resend: Resend
    """What a second sending would do."""

    body: bytes | None = None
    """JSON body, not compressed. None: no body."""

    expects_json: bool = True
    """Whether a reply that is not labelled as JSON is refused."""

    removes_batch: bool = False
    """Whether the server forgets what it answers: any doubt about the reply is a possible loss."""


def parse_batch(body: bytes) -> BatchReply:
    """Read the body of ``GET /batch``. Groups that are no JSON are set apart, as far as that is possible.

    Raises:
        InvalidReply: If it is not JSON or not a batch reply.
    """
    return _reading(read_batch, BatchReply)(body)


def claims_batch(body: bytes) -> bool:
    """Whether a reply to ``GET /batch`` is meant to be a batch, by its two ends alone.

    A reply that says that there is none has an empty list or null, and what else may come has other ends.
    """
    begins = _BATCH_BEGINS.search(body, 0, _NEAR_AN_END) is not None
    return begins and body[-_NEAR_AN_END:].rstrip().endswith(b"}")


def fetch_batch() -> Call[BatchReply]:
    """``GET /batch``, parsed."""
    return Call(
        method="GET",
        path="/batch",
        parse=parse_batch,
        resend=Resend.ONLY_IF_NOT_SENT,
        removes_batch=True,
    )


def fetch_batch_body() -> Call[bytes]:
    """``GET /batch``, as bytes that nobody has looked into yet."""
    return Call(method="GET", path="/batch", parse=bytes, resend=Resend.ONLY_IF_NOT_SENT, removes_batch=True)


def register(registration: Registration) -> Call[RegistrationReply]:
    """``POST /register``. The server ignores what a second one says, so that repeating it is harmless."""
    return _post("/register", registration, RegistrationReply, Resend.HARMLESS)


def status() -> Call[StatusReply]:
    """``GET /status``."""
    return _get("/status", StatusReply)


def info() -> Call[InfoReply]:
    """``GET /info``."""
    return _get("/info", InfoReply)


def wandb_info() -> Call[WandbInfoReply]:
    """``GET /wandb_info``."""
    return _get("/wandb_info", WandbInfoReply)


def latest_example() -> Call[ScoredGroup | None]:
    """``GET /latest_example``: the last group that reached the queue, None if there was none."""

    def parse(body: bytes) -> ScoredGroup | None:
        # What the server answers when it has none: every field an empty list.
        return None if body.startswith(b'{"tokens":[],') else _reader(ScoredGroup)(body)

    return Call(method="GET", path="/latest_example", parse=parse, resend=Resend.HARMLESS)


def register_environment(registration: EnvironmentRegistration) -> Call[EnvironmentRegistrationReply]:
    """``POST /register-env``. A second one would add a second environment."""
    return _post("/register-env", registration, EnvironmentRegistrationReply, Resend.ONLY_IF_NOT_SENT)


def environment_status(env_id: int) -> Call[EnvironmentStatus]:
    """``GET /status-env``, which carries a JSON body."""
    return Call(
        method="GET",
        path="/status-env",
        body=EnvironmentIdentifier(env_id=env_id).model_dump_json().encode(),
        parse=_reader(EnvironmentStatus),
        resend=Resend.HARMLESS,
    )


def push_group(group: ScoredGroup) -> Call[ScoredDataReply]:
    """``POST /scored_data``. A second one would store the group twice."""
    return Call(
        method="POST",
        path="/scored_data",
        body=group.model_dump_json(exclude_none=True).encode(),
        parse=_reader(ScoredDataReply),
        resend=Resend.ONLY_IF_NOT_SENT,
    )


def push_groups(groups: Sequence[ScoredGroup]) -> Call[ScoredDataListReply]:
    """``POST /scored_data_list``. A second one would store the groups twice."""
    return Call(
        method="POST",
        path="/scored_data_list",
        body=_GROUPS.dump_json(list(groups), exclude_none=True),
        parse=_reader(ScoredDataListReply),
        resend=Resend.ONLY_IF_NOT_SENT,
    )


def disconnect_environment(env_id: int) -> Call[DisconnectReply]:
    """``POST /disconnect-env``."""
    return _post("/disconnect-env", EnvironmentIdentifier(env_id=env_id), DisconnectReply, Resend.HARMLESS)


def reset_data() -> Call[None]:
    """``GET /reset_data``: wipes the queue and the registration. Answers plain text."""
    return Call(
        method="GET",
        path="/reset_data",
        parse=lambda body: None,
        resend=Resend.HARMLESS,
        expects_json=False,
    )


def greeting() -> Call[None]:
    """``GET /``: whether anything answers at all."""
    return Call(method="GET", path="/", parse=lambda body: None, resend=Resend.HARMLESS)


def _get(path: str, reply: type[M]) -> Call[M]:
    return Call(method="GET", path=path, parse=_reader(reply), resend=Resend.HARMLESS)


def _post(path: str, request: BaseModel, reply: type[M], resend: Resend) -> Call[M]:
    body = request.model_dump_json().encode()
    return Call(method="POST", path=path, body=body, parse=_reader(reply), resend=resend)


def _reader(model: type[M]) -> Callable[[bytes], M]:
    return _reading(model.model_validate_json, model)


def _reading(parse: Callable[[bytes], M], model: type[M]) -> Callable[[bytes], M]:
    """Return the one place where a validation error becomes an error of ours."""

    def read(body: bytes) -> M:
        try:
            return parse(body)
        except ValidationError as error:
            raise InvalidReply(
                f"the reply is no {model.__name__}: {first_problem(error)} ({len(body)} bytes came)"
            ) from error

    return read

"""Describes one request to the Atropos API: what to send and how to read the reply. No I/O."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from atropos_client._retry import Resend
from atropos_client.errors import InvalidReply
from schemas import BatchReply, first_problem, read_batch

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

_NEAR_AN_END: Final = 1024  # bytes
_BATCH_BEGINS: Final = re.compile(rb'"batch"\s*:\s*\[\s*[^\s\]]')


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


def get(path: str, reply: type[M], request: BaseModel | None = None) -> Call[M]:
    """A request that changes nothing and is answered by a `reply`; one route reads a body all the same."""
    body = request.model_dump_json().encode() if request else None
    return Call(method="GET", path=path, body=body, parse=reader(reply), resend=Resend.HARMLESS)


def post(path: str, request: BaseModel, reply: type[M], resend: Resend) -> Call[M]:
    """A request that sends `request` and is answered by a `reply`."""
    body = request.model_dump_json().encode()
    return Call(method="POST", path=path, body=body, parse=reader(reply), resend=resend)


def reader(model: type[M]) -> Callable[[bytes], M]:
    """How a body is read as `model`."""
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

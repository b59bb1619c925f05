"""Reads the bodies of replies. No I/O."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from pydantic import BaseModel, ValidationError

from atropos_client.errors import InvalidReply
from schemas import BatchReply, first_problem, read_batch

M = TypeVar("M", bound=BaseModel)

_NEAR_AN_END: Final = 1024  # bytes
_BATCH_BEGINS: Final = re.compile(rb'"batch"\s*:\s*\[\s*[^\s\]]')


def parse_batch(body: bytes) -> BatchReply:
    """Read the body of ``GET /batch``. Groups that are no JSON are set apart, as far as that is possible.

    Raises:
        InvalidReply: If it is not JSON or not a batch reply.
    """
    with _translated(BatchReply, body):
        return read_batch(body)


def read_as(model: type[M], body: bytes) -> M:
    """Read any other body.

    Raises:
        InvalidReply: If it is not JSON or no `model`.
    """
    with _translated(model, body):
        return model.model_validate_json(body)


def claims_batch(body: bytes) -> bool:
    """Whether a reply to ``GET /batch`` is meant to be a batch, by its two ends alone.

    A reply that says that there is none has an empty list or null, and what else may come has other ends.
    """
    begins = _BATCH_BEGINS.search(body, 0, _NEAR_AN_END) is not None
    return begins and body[-_NEAR_AN_END:].rstrip().endswith(b"}")


@contextmanager
def _translated(model: type[BaseModel], body: bytes) -> Iterator[None]:
    """Turn a validation error into an error of ours; the only place that does."""
    try:
        yield
    except ValidationError as error:
        raise InvalidReply(
            f"the reply is no {model.__name__}: {first_problem(error)} ({len(body)} bytes came)"
        ) from error

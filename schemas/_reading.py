"""Reading the body of ``GET /batch``, so that one group that is no JSON does not cost the others.

A JSON reader refuses a body as a whole: for text that is not UTF-8, half of a surrogate pair, a number
of thousands of digits, or nesting of hundreds of levels, though it may lie in a field that nobody reads.
Then, and only then, the groups are cut apart by looking at brackets and strings alone, and read one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from schemas._batch import BatchReply, Unusable
from schemas._group import ScoredGroup

MAX_CONTAINERS: Final = 1 << 23
"""Lists and objects in one body. Each takes about 500 bytes of memory when it is read and 2 in the body, so
that a body of the largest size could take hundreds of times its size."""

# Whole strings, a quote that nothing closes, brackets. Possessive: every byte is looked at once.
_TOKEN: Final = re.compile(rb'"(?:[^"\\]|\\.)*+"|"|[\[\]{}]', re.DOTALL)
_BEFORE_GROUPS: Final = re.compile(rb'\s*\{\s*"batch"\s*:\s*\[')
_AFTER_GROUPS: Final = re.compile(rb"\s*\]\s*\}\s*\Z")
_BETWEEN_GROUPS: Final = re.compile(rb"\s*,\s*")


def read_batch(body: bytes) -> BatchReply:
    """Read a reply; groups that are no JSON end in its `rejected`, like all others that cannot be used.

    Raises:
        pydantic.ValidationError: It is no batch reply, or of a size that no memory would hold.
    """
    containers = body.count(b"[") + body.count(b"{")
    if containers > MAX_CONTAINERS:
        problem = PydanticCustomError(
            "too_many_containers",
            "it holds {found} lists and objects, the maximum is {maximum}",
            {"found": containers, "maximum": MAX_CONTAINERS},
        )
        raise ValidationError.from_exception_data(
            "BatchReply", [InitErrorDetails(type=problem, loc=(), input=len(body))]
        )
    try:
        return BatchReply.model_validate_json(body)
    except ValidationError as error:
        if error.errors(include_url=False, include_input=False)[0]["type"] != "json_invalid":
            raise
        groups = cut_apart(body)
        if not groups:
            raise
    return BatchReply.model_construct(batch=[each for group in groups for each in _read_alone(group)])


def _read_alone(group: bytes) -> Iterator[ScoredGroup | Unusable]:
    try:
        yield from BatchReply.model_validate_json(b'{"batch":[' + group + b"]}").batch or ()
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[0]["msg"]
        yield Unusable(group.decode("utf-8", errors="backslashreplace"), f"it cannot be read: {found}")


def cut_apart(body: bytes) -> list[bytes]:
    """Cut ``{"batch": [group, ...]}`` into the bytes of its groups; empty if it is anything else.

    Takes a time proportional to the body, whatever is in it.
    """
    start = _BEFORE_GROUPS.match(body)
    if start is None:
        return []
    groups: list[bytes] = []
    depth, began, ended = 0, start.end(), start.end()
    for token in _TOKEN.finditer(body, start.end()):
        kind = token[0]
        if kind == b'"':
            return []
        if kind in (b"{", b"["):
            if depth == 0:
                began = token.start()
                between = _BETWEEN_GROUPS if groups else re.compile(rb"\s*")
                if between.fullmatch(body, ended, began) is None:
                    return []
            depth += 1
        elif kind in (b"}", b"]"):
            if depth == 0:  # of the list itself
                return groups if _AFTER_GROUPS.match(body, ended) else []
            depth -= 1
            if depth == 0:
                ended = token.end()
                groups.append(body[began:ended])
    return []

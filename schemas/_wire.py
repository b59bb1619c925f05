"""Shared by every wire model: the strict base class, "empty means absent", and one-line error texts.

The wire is JSON written by programs that we do not control. Models are strict (a float is not a token id, a
string is not a score), frozen, and ignore keys that they do not know, so that a newer server does not break
an older trainer.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, ErrorDetails, core_schema

_LONGEST_VALUE = 60  # characters of an offending value that an error message quotes


class WireModel(BaseModel):
    """Base of every request and reply: strict, immutable, tolerant of unknown keys."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class EmptyMeansNone:
    """Annotation marker: ``null``, ``[]`` and ``{}`` all become ``None``.

    Environments and the server itself are uneven about optional keys: the same missing value travels as an
    absent key, as null, as an empty list, or as an empty object. Use as
    ``Annotated[list[int] | None, EmptyMeansNone()]``. The real type is tried first, so that a present value
    costs nothing extra.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Wrap the schema of the annotated type."""
        value_or_empty = core_schema.union_schema(
            [
                handler(source),
                (core_schema.list_schema(max_length=0), "empty list"),
                (core_schema.dict_schema(max_length=0), "empty object"),
            ],
            mode="left_to_right",
        )
        return core_schema.no_info_after_validator_function(_none_if_empty, value_or_empty)


def _none_if_empty(value: Any) -> Any:
    """Return None for an empty list or dict, everything else (0 and False included) unchanged."""
    return None if isinstance(value, list | dict) and not value else value


def first_problem(error: ValidationError) -> str:
    """Say in one line what the first error of a failed validation is, and where.

    Args:
        error: What pydantic raised.

    Returns:
        For example ``tokens[3][17]: Input should be a valid integer, found 1.5``.
    """
    details = error.errors(include_url=False)[0]
    # Our own checks raise ValueError and name the place themselves.
    if details["type"] == "value_error":
        return str(details["ctx"]["error"])
    place = _place(details)
    found = "" if details["type"] == "missing" else f", found {quote(details['input'])}"
    return f"{place}: {details['msg']}{found}" if place else f"{details['msg']}{found}"


def quote(value: object) -> str:
    """Return a short, one-line rendering of an offending value."""
    # Slice before rendering: the value may be a list of a million numbers.
    if isinstance(value, list) and len(value) > 8:
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object with {len(value)} keys"
    text = repr(value[: _LONGEST_VALUE + 1] if isinstance(value, str) else value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "..."


def _place(details: ErrorDetails) -> str:
    """Render a pydantic location as ``field[1][2]``, leaving out the names of union branches."""
    place = ""
    for part in details["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif not place:
            place = part
    return place

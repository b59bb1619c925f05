"""What every section of the configuration has in common."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict

Item = TypeVar("Item")


def _split_at_commas(value: Any) -> Any:
    """Read `a,b` as `[a, b]`, so that lists are easy to write on a command line."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


CommaList = Annotated[list[Item], BeforeValidator(_split_at_commas)]


class Section(BaseModel):
    """A frozen section: unknown keys are refused, and each field's docstring is its help text."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

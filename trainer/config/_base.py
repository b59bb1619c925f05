"""The base class of all sections of the configuration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator

from trainer.options import read_none

Item = TypeVar("Item")


def _split_at_commas(value: Any) -> Any:
    """Read `a,b` as `[a, b]`, so that lists are easy to write on a command line."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


CommaList = Annotated[list[Item], BeforeValidator(_split_at_commas)]
CommaPair = Annotated[tuple[Item, Item], BeforeValidator(_split_at_commas)]


def expand_home(path: str) -> str:
    """Replace a leading `~` or `~user`; refuse what no file system can have as a name."""
    if "\0" in path:
        raise ValueError("a path cannot hold the character NUL")
    if path == "":
        raise ValueError("it is empty; the present directory is '.'")
    expanded = os.path.expanduser(path)  # noqa: PTH111 - pathlib's would make `org/name` of `./org/name`
    if expanded.startswith("~"):
        raise ValueError(f"nobody has the home directory {path.partition('/')[0]}; write ./~ for that name")
    return expanded


PathOrHubId = Annotated[str, AfterValidator(expand_home)]


class Section(BaseModel):
    """A frozen section: unknown keys are refused, and each field's docstring is its help text."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,  # a token may stand there
        protected_namespaces=(),
    )

    @field_validator("*", mode="before")
    @classmethod
    def _none_is_none_and_paths_are_expanded(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        value = read_none(value, annotation)
        is_path = annotation is Path or Path in get_args(annotation)
        return expand_home(str(value)) if is_path and isinstance(value, str | Path) else value

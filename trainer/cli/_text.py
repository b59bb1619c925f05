"""Text of others on a console."""

from __future__ import annotations

from rich.markup import escape as escape_markup

from schemas import printable


def escape(text: str, *, lines: bool = False) -> str:
    """Text as it stands, for a console that reads markup: nothing in it acts; for `lines` see `printable`."""
    return escape_markup(printable(text, lines=lines))

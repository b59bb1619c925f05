"""Escapes control characters in untrusted text, and writes counts, for terminals and logs."""

from __future__ import annotations

import re
from typing import Final

# C0 and C1 controls (terminal escape sequences begin with one), line and paragraph separators, and the marks
# that turn the direction of writing, by which a line can be made to read as another one.
_ACTING: Final = "\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069"
_ON_ONE_LINE: Final = re.compile(f"[{_ACTING}]")
_ON_LINES: Final = re.compile(f"(?![\n\t])[{_ACTING}]")


def printable(text: str, *, lines: bool = False) -> str:
    """Return `text` with every character that a terminal or a log would obey written as an escape.

    Args:
        text: Whatever a server, an environment or a file says.
        lines: Leave line ends and tabs as they are, for texts of several lines that are ours.
    """
    pattern = _ON_LINES if lines else _ON_ONE_LINE
    return pattern.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def count_of(number: int, noun: str) -> str:
    """Write how many there are of something: `1 batch`, `2 batches`, `0 bodies`."""
    if number == 1:
        return f"1 {noun}"
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{number} {noun}es"
    if noun.endswith("y"):
        return f"{number} {noun[:-1]}ies"
    return f"{number} {noun}s"

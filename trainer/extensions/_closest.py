"""Finds the name that was meant by one that does not exist, for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_FEWEST_LETTERS = 3  # of a word that is completed: two letters begin too many names


def same_name(word: str, names: Iterable[str]) -> str | None:
    """Return the name that differs from a word in case and punctuation only."""
    return next((name for name in names if _plain(name) == _plain(word)), None)


def closest_name(word: str, names: Iterable[str]) -> str | None:
    """Return the name that was most likely meant by a word; None if none is near.

    Before those that are spelled alike come the same letters, then a name that begins with the word: `ppo`
    means `ppo_clip`, though `ipo` has more of its letters in common.
    """
    plain_names = {_plain(name): name for name in names}
    plain = _plain(word)
    if plain in plain_names:
        return plain_names[plain]
    if len(plain) >= _FEWEST_LETTERS:
        for each, name in plain_names.items():
            if each.startswith(plain):
                return name
    close = difflib.get_close_matches(plain, plain_names, n=1)
    return plain_names[close[0]] if close else None


def _plain(name: str) -> str:
    """A name's letters and digits; `reinforce++` is also written `reinforce_plus_plus`."""
    return "".join(filter(str.isalnum, name.replace("+", "plus").casefold()))

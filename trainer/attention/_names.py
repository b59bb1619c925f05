"""Names under which the back-ends are known to transformers."""

from __future__ import annotations

TILED = "atropos_tiled"
FLEX = "atropos_flex"

STRUCTURE = "row_structure"
"""Keyword argument of the model's forward, and so of the attention function, that describes the row."""

OWN = {"tiled": TILED, "flex": FLEX}
"""The back-ends of this package by their names in the configuration."""

_TAKES_A_MASK = ("sdpa", "eager")


def takes_trees(implementation: str | None) -> bool:
    """Whether an attention implementation can be told to attend along a tree."""
    return implementation in (TILED, FLEX, *_TAKES_A_MASK)


def loaded_implementation(setting: str) -> str | None:
    """What a model is loaded with for `model.attention`; None for transformers' own choice.

    Our back-ends are switched to afterwards, once the model has shown that it can take them.
    """
    if setting == "auto":
        return None
    return "sdpa" if setting in OWN else setting


def readable(implementation: str | None) -> str:
    """The name of an implementation as the configuration has it."""
    return next((name for name, known in OWN.items() if known == implementation), str(implementation))

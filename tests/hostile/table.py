"""The whole table."""

from __future__ import annotations

from tests.hostile.case import Case, GroupCase
from tests.hostile.episodes import EPISODE_CASES
from tests.hostile.reply_cases import REPLY_CASES
from tests.hostile.shape_cases import SHAPE_CASES
from tests.hostile.value_cases import VALUE_CASES

GROUP_CASES: list[GroupCase] = [*SHAPE_CASES, *VALUE_CASES]

ALL_CASES: list[Case] = [*GROUP_CASES, *REPLY_CASES, *EPISODE_CASES]

API_TAKES = {
    "a score beyond every float",
    "a group without sequences",
    "thousands of tiny groups",
    "thousands of bad groups",
}
"""Rows that a server sends although the API would take them: it changes them, or is slow at them."""

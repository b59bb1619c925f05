"""The whole table."""

from __future__ import annotations

from tests.hostile.case import Case, GroupCase, ReplyCase
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

WHOLE_RUNS = {
    # of an environment
    "a group without sequences, through the API",
    "one giant group",
    "only sequences of length 1",
    "everything masked",
    "masks of 0 and 1",
    "a token id outside the vocabulary",
    "equal scores",
    "an infinite advantage, through the API",
    "advantages of 1e38 under global normalization",
    "a loss that is not finite",
    "a temperature of 0",
    "nesting of 300 levels",
    # of a server
    "thousands of tiny groups",
    "thousands of bad groups",
    "a NaN score",
    "null for a group",
    "an empty body",
    "half a body",
    "an object without a batch",
    "invalid UTF-8",
    "gzip in two members",
    "gzip cut off",
    "a gzip bomb",
    "silence",
    "a connection reset in the body",
    "503 of a proxy",
    "a storm of 500s",
}
"""Rows that go through the whole loop besides refusals, episodes and harmless replies; others of their kind
are fetched, read and prepared by the same parts, and compared there."""


def runs_whole(case: Case) -> bool:
    """Whether a row goes through the training loop."""
    harmless = isinstance(case, ReplyCase) and case.outcome == "trained" and not case.good_part
    return case.outcome == "refused" or case.name in WHOLE_RUNS or harmless

"""A group's per-token fields as plain memory: checked there, and made into tensors without a copy per number.

Everything is in native byte order, sequences one after another. The functions take and give one row.
Reading lists one Python object at a time is what intake spends its time on, so each list is read once.
"""

from __future__ import annotations

import re
import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

IGNORE_INDEX: Final = -100
"""Mask value of a token that is not trained on."""

LARGEST_TOKEN_ID: Final = 2**31 - 1

_ITEM: Final = 4  # bytes of an int32 and of a float32
_TOP_BYTES: Final = slice(_ITEM - 1 if sys.byteorder == "little" else 0, None, _ITEM)
_IGNORED: Final = struct.pack("i", IGNORE_INDEX)
# The top byte of -100, and of no token id.
_IGNORED_RUN: Final = re.compile(rb"\xff+")
# Top bytes of float32 numbers that are negative or below 2 ** -21.
_NEGATIVE_OR_TINY: Final = bytes([*range(0x35), *range(0x80, 0x100)])


@dataclass(frozen=True, kw_only=True)
class FlatGroup:
    """The per-token fields of a group of ``n`` sequences; ``N`` is the sum of their lengths ``T_i``."""

    lengths: list[int]
    """[n] the ``T_i``."""
    tokens: bytes
    """[N] int32."""
    masks: bytes
    """[N] int32: -100 or the token id."""
    advantages: bytes | None
    """[N] float32. None: not sent."""
    ref_logprobs: bytes | None
    """[N] float32. None: not sent."""
    inference_logprobs: bytes | None
    """[N] float32. None: not sent."""


def flatten_tokens(rows: Sequence[Sequence[int]]) -> list[bytes]:
    """Give each row as int32.

    Raises:
        ValueError: If a number is no token id.
    """
    try:
        # Unsigned, because Python fills such an array twice as fast, and refuses negative numbers.
        flat = [array("I", row).tobytes() for row in rows]
    except OverflowError:
        _refuse_token_ids(rows)
        raise
    if not all(row[_TOP_BYTES].isascii() for row in flat):  # a top bit is set: beyond int32
        _refuse_token_ids(rows)
    return flat


def _refuse_token_ids(rows: Sequence[Sequence[int]]) -> None:
    for i, row in enumerate(rows):
        for t, token in enumerate(row):
            if not 0 <= token <= LARGEST_TOKEN_ID:
                bound = (
                    "greater than or equal to 0" if token < 0 else f"less than or equal to {LARGEST_TOKEN_ID}"
                )
                raise ValueError(f"tokens[{i}][{t}]: Input should be {bound}, found {token}")


def flatten_mask(mask: Sequence[int], tokens: bytes) -> bytes | None:
    """Give a mask as int32; None if any entry is neither -100 nor the token's own id.

    Args:
        mask: [T].
        tokens: [T] int32, of the same sequence.
    """
    try:
        flat = struct.pack(f"{len(mask)}i", *mask)
    except struct.error:
        return None  # beyond int32
    expected = bytearray(tokens)
    for start, end in _ignored_runs(flat):
        expected[start * _ITEM : end * _ITEM] = _IGNORED * (end - start)
    return flat if flat == expected else None


def flatten_floats(row: Sequence[float]) -> bytes:
    """Give numbers that float32 can hold as float32."""
    return struct.pack(f"{len(row)}f", *row)


def first_positive(row: Sequence[float], flat: bytes, mask: bytes, *, slack: float) -> int | None:
    """Find the first trained position whose value exceeds `slack`; None if there is none.

    Args:
        row: [T].
        flat: [T] float32, the same numbers.
        mask: [T] int32.
        slack: At least ``2 ** -21``.
    """
    top = flat[_TOP_BYTES]
    for start, end in _trained_runs(mask):
        if top[start:end].translate(None, delete=_NEGATIVE_OR_TINY):  # something is left: look closely
            for column in range(start, end):
                if row[column] > slack:
                    return column
    return None


def _trained_runs(mask: bytes) -> Iterator[tuple[int, int]]:
    """Yield start and end of every run of trained tokens."""
    done = 0
    for start, end in _ignored_runs(mask):
        if start > done:
            yield done, start
        done = end
    if done * _ITEM < len(mask):
        yield done, len(mask) // _ITEM


def _ignored_runs(mask: bytes) -> list[tuple[int, int]]:
    """Find start and end of every run of tokens that are not trained on."""
    top = mask[_TOP_BYTES]
    prompt = len(top) - len(top.lstrip(b"\xff"))
    if top.find(b"\xff", prompt) < 0:  # nearly every mask is "prompt, then answer"
        return [(0, prompt)]
    return [run.span() for run in _IGNORED_RUN.finditer(top)]

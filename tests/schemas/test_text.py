"""Counts are written as one says them."""

from __future__ import annotations

from schemas import count_of


def test_one_is_singular_and_everything_else_plural() -> None:
    assert [count_of(number, "optimizer step") for number in (0, 1, 2)] == [
        "0 optimizer steps",
        "1 optimizer step",
        "2 optimizer steps",
    ]
    nouns = ("batch", "body", "process")
    assert [count_of(2, noun) for noun in nouns] == ["2 batches", "2 bodies", "2 processes"]

"""Hypothesis strategies for groups as environments send them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

IGNORE = -100
token_ids = st.integers(min_value=0, max_value=200_000)
logprobs = st.floats(min_value=-50, max_value=0)
scores = st.floats(allow_nan=False, allow_infinity=False, width=32)


@st.composite
def sequences(draw: st.DrawFn) -> dict[str, list[Any]]:
    """One sequence: tokens, a mask over any positions, and log-probs with the filler where masked."""
    tokens = draw(st.lists(token_ids, min_size=1, max_size=12))
    trained = draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    return {
        "tokens": tokens,
        "trained": trained,
        "masks": [t if on else IGNORE for t, on in zip(tokens, trained, strict=True)],
        "logprobs": [draw(logprobs) if on else 1.0 for on in trained],
    }


@st.composite
def groups(draw: st.DrawFn) -> dict[str, Any]:
    """A whole valid group as the JSON object on the wire; optional fields come and go."""
    rows = draw(st.lists(sequences(), min_size=1, max_size=4))
    group: dict[str, Any] = {
        "tokens": [row["tokens"] for row in rows],
        "masks": [row["masks"] for row in rows],
        "scores": draw(st.lists(scores, min_size=len(rows), max_size=len(rows))),
    }
    absent: st.SearchStrategy[Any] = st.sampled_from([None, [], {}])
    optional: dict[str, Any] = {
        "inference_logprobs": [row["logprobs"] for row in rows],
        "ref_logprobs": [list(row["logprobs"]) for row in rows],
        "advantages": [[0.5] * len(row["tokens"]) for row in rows],
        "overrides": [{"set_advantage_to_zero": True} for _ in rows],
        "generation_params": {"temperature": 0.7},
        "group_overrides": {"temperature": 1.0},
        "distill_token_ids": [[[1, 2]] * len(row["tokens"]) for row in rows],
        "env_id": 3,
    }
    for name, value in optional.items():
        choice = draw(st.sampled_from(["present", "empty", "missing"]))
        if choice == "present":
            group[name] = value
        elif choice == "empty":
            group[name] = None if name == "env_id" else draw(absent)
    if group.get("distill_token_ids"):
        group["distill_logprobs"] = [[[-1.0, -2.0]] * len(row["tokens"]) for row in rows]
    return group

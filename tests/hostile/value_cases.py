"""Rows of the table: groups whose numbers, wishes, JSON or types are bad."""

from __future__ import annotations

from typing import Any

from tests.hostile.case import (
    BASE,
    GroupCase,
    aside,
    aside_whole,
    changed,
    flat,
    lost,
    trained,
    with_value,
    without,
)
from trainer.errors import TooManySetAside, TooManySkippedBatches

NAN, INFINITY = float("nan"), float("inf")
RAW_SCORES = ("--data.advantage_estimator", "raw", "--loss.name", "weighted_sft")


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


NUMBERS = [
    *(
        row
        for name, text, place in [
            ("a NaN score", changed(scores=[NAN, 0.0]), r"scores\[0\]"),
            ("an infinite score", changed(scores=[INFINITY, 0.0]), r"scores\[0\]"),
            ("a NaN advantage", changed(advantages=[[NAN] * 5, [0.0] * 6]), r"advantages\[0\]\[0\]"),
            ("an infinite advantage", changed(advantages=[[0.0] * 5, [-INFINITY] * 6]), r"advantages\[1\]"),
            ("a NaN log-prob", with_value("inference_logprobs", 0, 3, NAN), r"inference_logprobs\[0\]\[3\]"),
            ("a log-prob of -Infinity", with_value("inference_logprobs", 0, 3, -INFINITY), "inference_logp"),
            ("a NaN temperature", changed(generation_params={"temperature": NAN}), "temperature nan"),
        ]
        for row in (
            lost(f"{name}, through the API", "Python's NaN or Infinity; the API answers 500", text),
            aside(name, "as Python's json writes it", text, place, by_server=True),
        )
    ),
    lost(
        "text NaN as a score, through the API",
        '"NaN"; the API makes it a number',
        changed(scores=["NaN", 0.0]),
    ),
    aside("text NaN as a score", '"NaN"', changed(scores=["NaN", 0.0]), r"scores\[0\]", by_server=True),
    aside(
        "null as a score", "scores = [null, 0.0]", changed(scores=[None, 0.0]), r"scores\[0\]", by_server=True
    ),
    aside(
        "null as a log-prob",
        "null at a trained token",
        with_value("inference_logprobs", 0, 3, None),
        r"inference_logprobs\[0\]\[3\]",
        by_server=True,
    ),
    aside(
        "null as an advantage",
        "advantages[0][0] = null",
        changed(advantages=[[None] * 5, [0.0] * 6]),
        r"advantages\[0\]\[0\]",
        by_server=True,
    ),
    aside(
        "a score beyond every float",
        "1e999",
        changed(scores=[9.5, 0.0]).replace("9.5", "1e999"),
        r"scores\[0\]",
        by_server=True,
    ),
    aside("a score of 1e308", "scores = [1e308, 0.0]", changed(scores=[1e308, 0.0]), r"scores\[0\]"),
    aside(
        "a huge score as a reward",
        "1e38 with data.advantage_estimator raw",
        changed(scores=[1e38, 0.0]),
        "the advantage of sequence 0 is 1e.38",
        options=RAW_SCORES,
    ),
    aside(
        "advantages of 1e38",
        "advantages[0] of 1e38",
        changed(advantages=[[1e38] * 5, [0.0] * 6]),
        r"advantages\[0\]\[3\] is 1e.38",
    ),
    aside(
        "advantages of 1e38 under global normalization",
        "the same; later steps must not be divided by it",
        changed(advantages=[[1e38] * 5, [0.0] * 6]),
        r"advantages\[0\]\[3\] is 1e.38",
        options=("--data.advantage_normalization", "global"),
    ),
    aside(
        "advantages of 1e308",
        "advantages[0] of 1e308",
        changed(advantages=[[1e308] * 5, [0.0] * 6]),
        r"advantages\[0\]\[0\]",
    ),
    aside_whole(
        "a loss that is not finite",
        "advantages of 1e38 with data.advantage_limit 1e39",
        [changed(advantages=[[1e38] * 5, [-1e38] * 6])] * 2,
        "is not finite",
        options=("--data.advantage_limit", "1e39"),
    ),
    aside(
        "a positive log-prob at a trained token",
        "0.25",
        with_value("inference_logprobs", 0, 3, 0.25),
        r"inference_logprobs\[0\]\[3\] is 0.25 at a trained position",
    ),
    aside(
        "the filler at a trained token",
        "1.0 where a log-prob is missing",
        with_value("inference_logprobs", 1, 4, 1.0),
        "the environment did not record this one",
    ),
]

WISHES = [
    *(
        aside(f"a temperature {name}", sent, changed(**{where: value}), r"has temperature.*0 \(greedy\)")
        for name, sent, where, value in [
            ("of 1e-30", "in overrides", "overrides", [{"temperature": 1e-30}, {}]),
            ("below 0", "-1 in generation_params", "generation_params", {"temperature": -1}),
            ("as text", '"0.7" in generation_params', "generation_params", {"temperature": "0.7"}),
            ("of true", "in group_overrides", "group_overrides", {"temperature": True}),
            ("of 1e30", "in overrides", "overrides", [{}, {"temperature": 1e30}]),
        ]
    ),
    trained(
        "a temperature of 0",
        "greedy, in generation_params: log-probs are those at 1",
        changed(generation_params={"temperature": 0}),
    ),
    trained(
        "a temperature of null",
        "in overrides and generation_params",
        changed(overrides=[{"temperature": None}] * 2, generation_params={"temperature": None}),
    ),
    trained(
        "an unusable temperature that the loss does not use",
        '"hot", with weighted_sft',
        changed(generation_params={"temperature": "hot"}),
        options=("--loss.name", "weighted_sft"),
    ),
    aside(
        "text for a flag",
        '"false" as set_advantage_to_zero, which would count as true',
        changed(overrides=[{"set_advantage_to_zero": "false"}, {}]),
        "it must be true or false",
    ),
    trained(
        "empty in place of absent",
        "overrides = [], generation_params = {}, group_overrides = {}",
        changed(overrides=[], generation_params={}, group_overrides={}, advantages=[], messages=[]),
    ),
    aside(
        "log-probs missing in one group",
        "no inference_logprobs, which loss.name policy_gradient needs",
        without("inference_logprobs"),
        "no inference_logprobs",
    ),
    GroupCase(
        name="log-probs missing in every group",
        sent="no inference_logprobs, train.max_consecutive_skips 1",
        outcome="refused",
        errors=(TooManySkippedBatches,),
        says="2 x no inference_logprobs.*ManagedServer",
        groups=[without("inference_logprobs")] * 2,
        neighbours=(),
        options=("--train.max_consecutive_skips", "1"),
    ),
    GroupCase(
        name="too large a share of bad groups",
        sent="one group of two, train.set_aside_limit 0.4",
        outcome="refused",
        errors=(TooManySetAside,),
        says=r"1 of the 2 groups \(50%\)",
        groups=[with_value("tokens", 0, 0, -1)],
        options=("--train.set_aside_window", "1", "--train.set_aside_limit", "0.4"),
    ),
    GroupCase(
        name="too many batches without signal",
        sent="equal scores, train.max_consecutive_skips 1",
        outcome="refused",
        errors=(TooManySkippedBatches,),
        says="no advantage differs from 0",
        groups=[flat({})] * 2,
        neighbours=(),
        options=("--train.max_consecutive_skips", "1"),
    ),
]

JSON_TRAPS = [
    trained("images of 8 MB", "a text of 8 million characters", changed(images=["x" * 8_000_000])),
    trained(
        "messages of 4 MB",
        "one message of 4 million characters",
        changed(messages=[[{"role": "user", "content": "x" * 4_000_000}], []]),
    ),
    trained("unknown keys", "a key that Atropos does not know", changed(surprise={"a": [1, 2]})),
    trained(
        "duplicate keys",
        'two "scores"; the last counts, as everywhere in Python',
        changed()[:-1] + ', "scores": [0.0, 1.0]}',
        {**BASE, "scores": [0.0, 1.0]},
    ),
    trained("nesting of 100 levels", "in images", changed(images=nested(100))),
    aside(
        "nesting of 300 levels",
        "in images; the API serves it, and our JSON reader does not go that deep",
        changed(images=nested(300)),
        "cannot be read: Invalid JSON: recursion limit",
    ),
    trained("an environment number beyond int64", "env_id = 10^30", changed(env_id=10**30)),
    aside(
        "a negative environment number",
        "env_id = -1, at which the API answers 500 to the environment",
        changed(env_id=-1, scores=[1.0]),
        "scores has 1 entries",
        by_server=True,
    ),
    lost(
        "half of a surrogate pair, through the API",
        r'"\ud800" in a message; the API answers 500',
        changed(messages=[[{"role": "user", "content": "\ud800"}], []]),
    ),
]

WRONG_TYPES = [
    aside(f"{name} for {what}", sent, text, says, by_server=True)
    for name, what, sent, text, says in [
        ("null", "a group", "null", "null", "must be a JSON object, found None"),
        ("text", "a group", '"group"', '"group"', "must be a JSON object"),
        ("a list", "a group", "[]", "[]", "must be a JSON object"),
        ("an empty object", "a group", "{}", "{}", "tokens: Field required"),
        ("null", "tokens", "tokens = null", changed(tokens=None), "tokens: Input should be a valid list"),
        ("text", "tokens", 'tokens = "abc"', changed(tokens="abc"), "tokens: Input should be a valid list"),
        ("one flat list", "tokens", "tokens = [1, 2]", changed(tokens=[1, 2]), r"tokens\[0\]: Input should"),
        ("too deep a list", "tokens", "tokens = [[[1]], [[2]]]", changed(tokens=[[[1]], [[2]]]), "tokens"),
        ("null", "masks", "masks = null", changed(masks=None), "masks: Input should be a valid list"),
        ("nothing", "masks", "no masks", without("masks"), "masks: Field required"),
        ("text", "a score", '"high"', changed(scores=["high", 0.0]), r"scores\[0\]"),
        ("a list", "a score", "[[1.0], [0.0]]", changed(scores=[[1.0], [0.0]]), r"scores\[0\]"),
        ("text", "overrides", '["zero", "zero"]', changed(overrides=["zero", "zero"]), r"overrides"),
        ("a number", "generation_params", "0.7", changed(generation_params=0.7), "generation_params"),
    ]
]

VALUE_CASES: list[GroupCase] = [*NUMBERS, *WISHES, *JSON_TRAPS, *WRONG_TYPES]

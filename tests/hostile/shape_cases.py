"""Rows of the table: groups whose shapes, masks or token ids are bad."""

from __future__ import annotations

import json
import random

from tests.hostile.case import (
    BASE,
    NEIGHBOUR,
    GroupCase,
    aside,
    aside_whole,
    changed,
    flat,
    trained,
    with_value,
)
from tests.trainer.batches import make_group

BINARY = [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]
ALL_MASKED = [[-100] * 5, [-100] * 6]
LONG = [[7] * 2049, [7] * 4]
SHORTEST = {
    "tokens": [[50], BASE["tokens"][1]],
    "masks": [[50], BASE["masks"][1]],
    "inference_logprobs": [[-0.5], BASE["inference_logprobs"][1]],
}
GIANT = make_group(random.Random(21), size=256)
TINY = [
    {"tokens": [[5, 6]], "masks": [[-100, 6]], "scores": [0.5], "inference_logprobs": [[1.0, -5.0]]}
    for _ in range(2000)
]

SHAPES = [
    aside(
        "mask shorter than its tokens",
        "masks[1] lacks an entry",
        changed(masks=[BASE["masks"][0], BASE["masks"][1][:-1]]),
        r"tokens\[1\] has 6 entries but masks\[1\] has 5",
    ),
    aside(
        "log-probs longer than their tokens",
        "inference_logprobs[0] has an entry too many",
        changed(inference_logprobs=[[*BASE["inference_logprobs"][0], -1.0], BASE["inference_logprobs"][1]]),
        r"inference_logprobs\[0\] has 6",
    ),
    aside(
        "advantages of another length",
        "advantages[0] has one entry",
        changed(advantages=[[1.0], [0.0] * 6]),
        r"advantages\[0\] has 1",
    ),
    aside(
        "advantages for one sequence only",
        "one row for two sequences",
        changed(advantages=[[1.0] * 5]),
        "advantages has 1 entries but tokens has 2",
    ),
    aside(
        "reference log-probs of another length",
        "ref_logprobs[1] has 2 entries",
        changed(ref_logprobs=[[1.0, 1.0, 1.0, -1.0, -1.0], [1.0, -1.0]]),
        r"ref_logprobs\[1\] has 2",
    ),
    aside(
        "fewer scores than sequences",
        "one score for two sequences",
        changed(scores=[1.0]),
        "scores has 1 entries",
    ),
    aside(
        "more scores than sequences",
        "three scores for two sequences",
        changed(scores=[1.0, 0.0, 0.5]),
        "scores has 3 entries",
    ),
    aside(
        "overrides of wrong length",
        "three overrides for two sequences",
        changed(overrides=[{}, {}, {}]),
        "overrides has 3 entries",
    ),
    aside(
        "distillation ids without log-probs",
        "distill_token_ids alone",
        changed(distill_token_ids=[[[1]] * 5, [[1]] * 6]),
        "distill_logprobs is missing",
    ),
    aside(
        "distillation candidates that differ",
        "two ids and one log-prob at each position",
        changed(
            distill_token_ids=[[[1, 2]] * 5, [[1, 2]] * 6], distill_logprobs=[[[-1.0]] * 5, [[-1.0]] * 6]
        ),
        "differ in candidates",
    ),
    aside(
        "an empty sequence",
        "tokens[0] = []",
        changed(
            tokens=[[], BASE["tokens"][1]],
            masks=[[], BASE["masks"][1]],
            inference_logprobs=[[], BASE["inference_logprobs"][1]],
        ),
        r"tokens\[0\] is empty",
    ),
    aside(
        "only empty sequences",
        "tokens = [[], []]",
        changed(tokens=[[], []], masks=[[], []], inference_logprobs=None),
        r"tokens\[0\] is empty",
    ),
    aside(
        "a group without sequences",
        "tokens, masks and scores are []",
        changed(tokens=[], masks=[], scores=[], inference_logprobs=None),
        "at least 1 item",
        by_server=True,
    ),
    GroupCase(
        name="a group without sequences, through the API",
        sent="the same; the API keeps it in its queue and never serves it",
        outcome="trained",
        groups=[changed(tokens=[], masks=[], scores=[], inference_logprobs=None)],
        neighbours=(NEIGHBOUR, BASE),
        good_part=[NEIGHBOUR, BASE],
    ),
    aside(
        "a sequence beyond the model's context",
        "2,049 tokens, the model takes 2,048",
        changed(tokens=LONG, masks=LONG, inference_logprobs=[[-1.0] * 2049, [-1.0] * 4]),
        "2049 tokens, more than the 2048",
    ),
    trained(
        "a sequence of length 1",
        "tokens[0] = [50], trained on: nothing predicts it",
        changed(**SHORTEST),
        {**BASE, **SHORTEST},
    ),
    aside_whole(
        "only sequences of length 1",
        "tokens = [[50], [51]]",
        [changed(tokens=[[50], [51]], masks=[[50], [51]], inference_logprobs=[[-1.0], [-1.0]])],
        "no token is trained on",
        batch_size=2,
        after=[NEIGHBOUR],
    ),
    aside_whole(
        "groups of one",
        "four groups of one sequence each",
        [changed(**{name: BASE[name][:1] for name in ("tokens", "masks", "scores", "inference_logprobs")})]
        * 4,
        "no advantage differs from 0",
    ),
    aside_whole("equal scores", "all scores 0.5, twice", [flat({})] * 2, "no advantage differs from 0"),
    GroupCase(
        name="one giant group",
        sent="256 sequences",
        outcome="trained",
        groups=[json.dumps(GIANT)],
        neighbours=(),
        good_part=[GIANT],
        batch_size=256,
        after=[make_group(random.Random(22), size=256)],
    ),
    aside_whole(
        "thousands of tiny groups",
        "2,000 groups of one sequence of two tokens",
        list(map(json.dumps, TINY)),
        "no advantage differs from 0",
        by_server=True,
    ),
    GroupCase(
        name="thousands of bad groups",
        sent="2,000 groups, each with a token id of -1",
        outcome="set aside",
        says=r"tokens\[0\]\[0\]",
        groups=[with_value("tokens", 0, 0, -1)] * 2000,
        good_part=[NEIGHBOUR],
        by_server=True,
    ),
]

MASKS = [
    trained("masks of 0 and 1", "masks = [[0, 0, 0, 1, 1], ...]", changed(masks=BINARY)),
    aside(
        "masks that disagree with the tokens",
        "masks[0][4] = 11 where the token is 10",
        with_value("masks", 0, 4, 11),
        r"masks\[0\]\[4\] is 11",
    ),
    aside(
        "0/1 masks in one sequence only",
        "masks[0] of 0 and 1, masks[1] of token ids",
        changed(masks=[BINARY[0], BASE["masks"][1]]),
        r"masks\[0\]\[0\] is 0",
    ),
    aside_whole(
        "everything masked",
        "every mask is -100, twice",
        [changed(masks=ALL_MASKED, inference_logprobs=None)] * 2,
        "no token is trained on",
        options=("--loss.name", "weighted_sft"),
    ),
    trained(
        "one sequence masked",
        "masks[1] is all -100",
        changed(masks=[BASE["masks"][0], ALL_MASKED[1]]),
        {**BASE, "masks": [BASE["masks"][0], ALL_MASKED[1]]},
    ),
]

TOKEN_IDS = [
    aside(
        "a token id outside the vocabulary",
        "token id 259, the model has 259 tokens",
        with_value("tokens", 0, 3, 259),
        "token id 259 lies outside the model's vocabulary",
    ),
    aside(
        "a negative token id",
        "token id -1",
        with_value("tokens", 0, 0, -1),
        r"tokens\[0\]\[0\].*greater than or equal to 0",
    ),
    aside(
        "the mask value as a token id", "token id -100", with_value("tokens", 0, 4, -100), r"tokens\[0\]\[4\]"
    ),
    aside(
        "a token id of 2^31", "token id 2147483648", with_value("tokens", 0, 3, 2**31), r"tokens\[0\]\[3\]"
    ),
    aside("a token id beyond int64", "token id 2^64", with_value("tokens", 0, 3, 2**64), r"tokens\[0\]\[3\]"),
    aside(
        "a token id of 4,000 digits",
        "token id 99...9",
        with_value("tokens", 0, 3, int("9" * 4000)),
        r"tokens\[0\]\[3\]",
    ),
    trained(
        "floats as token ids, through the API",
        "52.0 for 52; the API makes it a whole number",
        with_value("tokens", 0, 3, 52.0),
    ),
    aside(
        "floats as token ids",
        "52.0 for 52",
        with_value("tokens", 0, 3, 52.0),
        r"tokens\[0\]\[3\]",
        by_server=True,
    ),
    aside(
        "fractions as token ids",
        "52.5",
        with_value("tokens", 0, 3, 52.5),
        r"tokens\[0\]\[3\]",
        by_server=True,
    ),
    trained(
        "booleans as token ids, through the API",
        "true; the API makes it 1",
        with_value("tokens", 0, 3, True),
        json.loads(with_value("tokens", 0, 3, 1)),
    ),
    aside(
        "booleans as token ids", "true", with_value("tokens", 0, 3, True), r"tokens\[0\]\[3\]", by_server=True
    ),
    trained(
        "text as token ids, through the API", '"52"; the API makes it 52', with_value("tokens", 0, 3, "52")
    ),
    aside("text as token ids", '"52"', with_value("tokens", 0, 3, "52"), r"tokens\[0\]\[3\]", by_server=True),
]

SHAPE_CASES: list[GroupCase] = [*SHAPES, *MASKS, *TOKEN_IDS]

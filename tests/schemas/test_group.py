"""ScoredGroup: what it accepts, what it converts, and how it says no; more of that is in `tests/hostile`."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas import IGNORE_INDEX, ScoredGroup, first_problem
from tests.schemas.groups import groups

GOOD: dict[str, Any] = {
    "tokens": [[11, 12, 40, 2], [11, 12, 2]],
    "masks": [[-100, -100, 40, 2], [-100, -100, 2]],
    "scores": [1.0, 0],
}


def read(**changes: Any) -> ScoredGroup:
    return ScoredGroup.model_validate_json(json.dumps({**GOOD, **changes}))


def reason(**changes: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        read(**changes)
    return first_problem(caught.value)


@given(groups())
def test_every_valid_group_is_accepted_from_json_and_from_python_alike(raw: dict[str, Any]) -> None:
    group = ScoredGroup.model_validate_json(json.dumps(raw))
    assert group == ScoredGroup.model_validate(raw)
    assert group.tokens == raw["tokens"]
    for name in ("inference_logprobs", "ref_logprobs", "advantages", "overrides", "distill_token_ids"):
        assert getattr(group, name) == (raw.get(name) or None)
    if not group.masks_were_binary:
        assert group.masks == raw["masks"]


@given(groups())
def test_a_group_survives_the_way_to_json_and_back(raw: dict[str, Any]) -> None:
    group = ScoredGroup.model_validate(raw)
    back = ScoredGroup.model_validate_json(group.model_dump_json(exclude_none=True))
    assert back.model_dump() == group.model_dump()


@given(groups(), st.data())
def test_a_row_of_any_other_length_is_refused_by_name(raw: dict[str, Any], data: st.DataObject) -> None:
    per_token = ["masks", "inference_logprobs", "ref_logprobs", "advantages", "distill_token_ids"]
    name = data.draw(st.sampled_from([n for n in per_token if raw.get(n)]))
    row = data.draw(st.integers(0, len(raw["tokens"]) - 1))
    broken = deepcopy(raw)
    broken[name][row].append(broken[name][row][-1])
    with pytest.raises(ValidationError) as caught:
        ScoredGroup.model_validate_json(json.dumps(broken))
    n = len(raw["tokens"][row])
    assert first_problem(caught.value) == f"tokens[{row}] has {n} entries but {name}[{row}] has {n + 1}"


@given(groups(), st.data())
def test_binary_masks_become_the_same_group_as_token_masks(raw: dict[str, Any], data: st.DataObject) -> None:
    # Ids above 1, so that no 0/1 mask is also a mask of token ids.
    tokens = [[t + 2 for t in row] for row in raw["tokens"]]
    bits = [data.draw(st.lists(st.sampled_from([0, 1]), min_size=len(r), max_size=len(r))) for r in tokens]
    masks = [
        [t if bit else IGNORE_INDEX for t, bit in zip(row, b, strict=True)]
        for row, b in zip(tokens, bits, strict=True)
    ]
    plain = {"tokens": tokens, "scores": raw["scores"]}
    converted = ScoredGroup.model_validate({**plain, "masks": bits})
    direct = ScoredGroup.model_validate({**plain, "masks": masks})
    assert converted.masks == direct.masks
    assert converted.masks_were_binary
    assert not direct.masks_were_binary
    assert converted.trained_token_count == sum(map(sum, bits))


@given(groups(), st.data())
def test_one_wrong_mask_value_anywhere_is_refused(raw: dict[str, Any], data: st.DataObject) -> None:
    row = data.draw(st.integers(0, len(raw["tokens"]) - 1))
    column = data.draw(st.integers(0, len(raw["tokens"][row]) - 1))
    broken = {"tokens": raw["tokens"], "masks": deepcopy(raw["masks"]), "scores": raw["scores"]}
    broken["masks"][row][column] = 999_999
    with pytest.raises(ValidationError, match=rf"masks\[{row}\]\[{column}\] is 999999"):
        ScoredGroup.model_validate(broken)


@pytest.mark.parametrize("value", [1.5, True, "7", None, -1, 2**31, [1]])
def test_only_whole_numbers_are_token_ids(value: Any) -> None:
    assert reason(tokens=[[11, value, 40, 2], [11, 12, 2]]).startswith("tokens[0][1]: ")


@pytest.mark.parametrize("value", [1.0, True, "40"])
def test_only_whole_numbers_are_mask_values(value: Any) -> None:
    assert reason(masks=[[-100, -100, value, 2], [-100, -100, 2]]).startswith("masks[0][2]: ")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1.0", True, None, 1e300])
def test_only_numbers_that_float32_can_hold_are_scores(value: Any) -> None:
    assert reason(scores=[1.0, value]).startswith("scores[1]: ")


@pytest.mark.parametrize("name", ["advantages", "inference_logprobs", "ref_logprobs"])
@pytest.mark.parametrize("value", [math.nan, -math.inf, "x", -1e39])
def test_only_finite_numbers_stand_in_per_token_fields(name: str, value: Any) -> None:
    rows = [[1.0, 1.0, -1.0, value], [1.0, 1.0, -1.0]]
    assert reason(**{name: rows}).startswith(f"{name}[0][3]: ")


@pytest.mark.parametrize("name", ["inference_logprobs", "ref_logprobs"])
def test_the_filler_at_a_trained_position_is_refused_and_explained(name: str) -> None:
    said = reason(**{name: [[1.0, 1.0, -0.5, 1.0], [1.0, 1.0, -1.0]]})
    assert said.startswith(f"{name}[0][3] is 1.0 at a trained position")
    assert "filler" in said


def test_the_filler_is_also_caught_behind_a_gap_in_the_mask() -> None:
    said = reason(
        masks=[[11, -100, -100, 2], [-100, -100, 2]],
        inference_logprobs=[[1.0, 1.0, 1.0, -1.0], [1.0, 1.0, -1.0]],
    )
    assert said.startswith("inference_logprobs[0][0] is 1.0")


def test_rounding_just_above_zero_is_a_logprob() -> None:
    rows = [[1.0, 1.0, 1e-7, -0.5], [1.0, 1.0, 0.0]]
    assert read(inference_logprobs=rows).inference_logprobs == rows


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"masks": [[-100, -100, 40, 2]]}, "masks has 1 entries but tokens has 2 sequences"),
        ({"overrides": [{}, 3]}, "overrides[1]: Input should be"),
        ({"advantages": "none"}, "advantages: Input should be a valid array, found 'none'"),
        ({"env_id": "7"}, "env_id: Input should be a valid integer, found '7'"),
        ({"generation_params": [1]}, "generation_params: Input should be"),
    ],
)
def test_refusals_name_place_and_fault(changes: dict[str, Any], said: str) -> None:
    assert reason(**changes).startswith(said)


@pytest.mark.parametrize("missing", ["tokens", "masks", "scores"])
def test_a_missing_required_field_is_named(missing: str) -> None:
    raw = {name: value for name, value in GOOD.items() if name != missing}
    with pytest.raises(ValidationError) as caught:
        ScoredGroup.model_validate(raw)
    assert first_problem(caught.value) == f"{missing}: Field required"


def test_a_huge_offending_value_does_not_fill_the_reason() -> None:
    assert len(reason(advantages="x" * 10_000_000)) < 200
    assert len(reason(env_id=list(range(100_000)))) < 200


def test_unknown_keys_and_free_form_fields_do_no_harm() -> None:
    group = read(novelty=[1], messages=[[{"role": "user", "content": "hi"}]], images=["a.png"], images2=0)
    assert group.messages == [[{"role": "user", "content": "hi"}]]
    assert group.images == ["a.png"]


def test_a_group_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        read().scores = [0.0, 0.0]  # type: ignore[misc]


def test_the_wire_cannot_set_the_flag_of_converted_masks() -> None:
    assert not read(masks_were_binary=True, _masks_were_binary=True).masks_were_binary


def test_counts_speak_of_sequences_and_tokens() -> None:
    group = read()
    assert (group.sequence_count, group.token_count, group.trained_token_count) == (2, 7, 3)

"""The demonstration task: which problems there are and how replies are scored."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_stack.arithmetic import (
    HELD_OUT_COUNT,
    Addition,
    share_right,
    split_problems,
    training_order,
)

addends = st.integers(min_value=1, max_value=20)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("12", 1.0),
        ("12.", 1.0),
        (" 12\n", 1.0),
        ("12.0", 1.0),
        ("**12**", 1.0),
        ("The answer is 12.", 1.0),
        ("7+5=12", 1.0),
        ("7 + 5 = 12!", 1.0),
        ("13, no, 12", 1.0),
        ("12, no, 13", 0.1),
        ("-12", 0.1),
        ("112", 0.1),
        ("1,012", 0.1),
        ("12.5", 0.1),
        ("7", 0.1),
        ("twelve", 0.0),
        ("", 0.0),
        ("I don't know.", 0.0),
    ],
)
def test_the_last_number_of_the_reply_decides(reply: str, score: float) -> None:
    assert Addition(7, 5).score(reply) == score


@given(first=addends, second=addends, prefix=st.text(alphabet="abc =,.!?\n", max_size=20))
def test_the_sum_at_the_end_is_right_whatever_words_come_first(first: int, second: int, prefix: str) -> None:
    problem = Addition(first, second)
    assert problem.score(f"{prefix} {problem.answer}") == 1.0


@given(first=addends, second=addends, reply=st.text(alphabet="0123456789 .,+-=abc\n²٣"))
def test_every_reply_gets_one_of_three_scores(first: int, second: int, reply: str) -> None:
    assert Addition(first, second).score(reply) in (0.0, 0.1, 1.0)


def test_the_question_is_the_one_that_was_measured() -> None:
    assert Addition(7, 5).question == "What is 7+5? Answer with one number."


def test_held_out_and_training_problems_are_disjoint_and_together_complete() -> None:
    training, held_out = split_problems()
    assert len(held_out) == len(set(held_out)) == HELD_OUT_COUNT == 48
    assert not set(training) & set(held_out)
    assert set(training) | set(held_out) == {Addition(a, b) for a in range(1, 21) for b in range(1, 21)}


def test_the_same_problems_are_held_out_every_time() -> None:
    first_held_out = split_problems()[1][:3]
    assert first_held_out == [Addition(10, 14), Addition(4, 7), Addition(9, 19)]


def test_a_seed_fixes_the_order_and_another_seed_changes_it() -> None:
    first, again, other = (list(islice(training_order(seed), 500)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_each_pass_shows_every_training_problem_once_and_never_a_held_out_one() -> None:
    training, held_out = split_problems()
    count = len(training)
    order = list(islice(training_order(0), 2 * count))
    assert sorted(order[:count]) == sorted(order[count:]) == sorted(training)
    assert order[:count] != order[count:]
    assert not set(order) & set(held_out)


def test_only_exactly_right_replies_count_towards_accuracy() -> None:
    assert share_right([1.0, 0.1, 0.0, 1.0]) == 0.5


def test_accuracy_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        share_right([])


def test_the_task_loads_neither_atropos_nor_torch() -> None:
    script = (
        "import sys, local_stack.arithmetic\n"
        "heavy = {'torch', 'transformers', 'atroposlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)

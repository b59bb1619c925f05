"""A rising share of groups set aside: heard past one share, the end of the run past another."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.batches import make_group
from tests.trainer.runs import rows, run
from trainer.checkpoints.format import CheckpointState
from trainer.config import TrainSettings
from trainer.errors import TooManySetAside
from trainer.samples.quarantine_rate import QuarantineRate, QuarantineWindow


def share_of(**settings: Any) -> QuarantineRate:
    return QuarantineRate(TrainSettings(**{"set_aside_window": 2, **settings}))


def test_nothing_is_judged_before_the_window_is_full() -> None:
    share = share_of()
    assert not share.add(groups=2, reasons=["bad", "bad"])
    assert share.share == 1.0


def test_the_alarm_names_the_share_and_the_most_frequent_reasons(caplog: pytest.LogCaptureFixture) -> None:
    share = share_of()
    share.add(groups=10, reasons=["scores[0]: found nan", "scores[17]: found nan"])
    with caplog.at_level(logging.WARNING):
        assert share.add(groups=10, reasons=["token id 5000 is unknown"])
    (message,) = [record.getMessage() for record in caplog.records]
    assert "3 of the 20 groups (15%) of the last 2 batches were set aside" in message
    assert "2 x e.g. scores[0]: found nan; 1 x token id 5000 is unknown" in message
    assert "train.set_aside_alarm 0.1" in message


def test_the_alarm_repeats_once_a_window_and_again_after_the_share_has_fallen() -> None:
    share = share_of(set_aside_limit=None)
    bad, good = ["bad"], list[str]()
    raised = [share.add(groups=4, reasons=reasons) for reasons in [bad] * 5 + [good] * 2 + [bad] * 1]
    assert raised == [False, True, False, True, False, True, False, True]


def test_both_can_be_switched_off() -> None:
    share = share_of(set_aside_alarm=None, set_aside_limit=None)
    assert not any(share.add(groups=1, reasons=["bad"]) for _ in range(5))


def mixed_body(seed: int, *, bad: int, good: int) -> bytes:
    generator = random.Random(seed)
    ragged = [make_group(generator, scores=[1.0]) for _ in range(bad)]
    return json.dumps({"batch": [*ragged, *(make_group(generator) for _ in range(good))]}).encode()


def test_a_run_counts_alarms_in_its_rows_and_ends_past_the_limit_with_everything_kept(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    bodies = [mixed_body(1, bad=0, good=4), mixed_body(2, bad=1, good=3), mixed_body(3, bad=4, good=1)]
    with pytest.raises(
        TooManySetAside, match=r"5 of the 9 groups .* scores has 1 entries.*mend the environment"
    ):
        run(tiny_model_directory, tmp_path, bodies, "--train.set_aside_window", "2")
    first, second = rows(tmp_path)
    assert (first["set_aside_share"], first["set_aside_alarms_total"]) == (0.0, 0)
    assert (second["set_aside_share"], second["set_aside_alarms_total"]) == (1 / 8, 1)
    assert (tmp_path / "set_aside/batch-000003.json").read_bytes() == bodies[2]
    assert (tmp_path / "checkpoints/step-000002/state.json").is_file()


def test_the_window_in_a_checkpoint_is_small_whatever_the_reasons() -> None:
    share = share_of(set_aside_window=20, set_aside_limit=None)
    for batch in range(40):
        share.add(groups=2000, reasons=[f"{'x' * 500} {chr(97 + i % 26)} {batch}" for i in range(2000)])
        share.add(groups=2000, reasons=[chr(0x4E00 + i) * 200 for i in range(2000)])
    assert len(share.state.model_dump_json()) < 100_000
    assert share.share == 1.0


def test_a_resumed_run_goes_on_with_the_window_that_its_checkpoint_has(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    bodies = [mixed_body(number, bad=1, good=3) for number in range(1, 5)]
    words = ("--train.set_aside_window", "3", "--train.set_aside_limit", "0.3")
    run(tiny_model_directory, tmp_path / "whole", bodies, *words, steps=4)
    run(tiny_model_directory, tmp_path / "parts", bodies[:2], *words, steps=2)
    run(tiny_model_directory, tmp_path / "parts", bodies[2:], *words, steps=4)
    shares = [[row["set_aside_share"] for row in rows(tmp_path / name)] for name in ("whole", "parts")]
    assert shares[0] == shares[1] == [1 / 4] * 4
    alarms = [rows(tmp_path / name)[-1]["set_aside_alarms_total"] for name in ("whole", "parts")]
    assert alarms == [1, 1], "raised with the third batch, which only a window of three has"


def test_a_window_of_reasons_without_their_numbers_is_counted_on() -> None:
    kept = {"batches": [{"groups": 4, "reasons": {"scores has N entries": 1, "scores has 2 entries": 1}}]}
    share = QuarantineRate(
        TrainSettings(set_aside_window=2, set_aside_limit=0.1), QuarantineWindow.model_validate(kept)
    )
    with pytest.raises(TooManySetAside, match=r"reasons: 3 x scores has N entries\. That is past"):
        share.add(groups=4, reasons=["scores has 3 entries"])


def test_a_skipped_batch_says_its_reasons_with_their_numbers(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    generator = random.Random(5)
    bad = [make_group(generator, scores=[1.0] * entries) for entries in (3, 2)]
    bodies = [mixed_body(1, bad=0, good=2), json.dumps({"batch": bad}).encode(), mixed_body(2, bad=0, good=2)]
    run(tiny_model_directory, tmp_path, bodies)
    (row,) = rows(tmp_path, "skipped")
    assert "were set aside: 2 x e.g. scores has 3 entries but tokens has 4 sequences" in row["reason"]


def test_a_checkpoint_of_before_there_was_a_window_is_read(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    summary = run(tiny_model_directory, tmp_path, [mixed_body(1, bad=1, good=3)], steps=1)
    content = json.loads((summary.checkpoint / "state.json").read_text())
    assert content.pop("set_aside_window")["batches"] == [
        {"groups": 4, "reasons": {"scores has 1 entries but tokens has 4 sequences": 1}}
    ]
    assert CheckpointState.model_validate(content).set_aside_window == QuarantineWindow()

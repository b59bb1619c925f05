"""The trainer's own log-probs of tokens: recorded by a real run, found again, and bounded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import trainer.run.logprob_log as log_module
from tests.trainer.batches import make_bodies
from tests.trainer.runs import run
from tests.view.made_run import write_journal
from trainer.row_files import LOGPROBS_FILE
from trainer.run.logprob_log import LogprobLog
from trainer.view.recorded_logprobs import RecordedLogprobs
from trainer.view.run_reader import RunReader


@pytest.mark.slow
def test_a_run_records_what_the_page_shows_beside_the_sampler(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    bodies = make_bodies(2)
    bad = json.loads(bodies[0])
    bad["batch"].insert(0, {"tokens": "nonsense"})  # the others are one place further
    bodies[0] = json.dumps(bad).encode()
    run(tiny_model_directory, tmp_path, bodies, steps=2)
    write_journal(tmp_path, bodies)
    reader = RunReader(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / LOGPROBS_FILE).read_text().splitlines()]
    assert len({row["group"] for row in rows if row["batch"] == 1}) == 2
    of_first = next(row["group"] for row in rows if row["batch"] == 1)
    shown = reader.group(1, of_first)
    differences = []
    for sequence in shown["sequences"]:
        assert sequence["trainer"] is not None
        for trained, trainer, sampler in zip(
            sequence["trained"], sequence["trainer"], sequence["sampler"], strict=True
        ):
            assert (trainer is not None) == bool(trained)
            if trained:
                assert trainer < 0
                differences.append(abs(trainer - sampler))
    # An untrained model finds each of 259 bytes about equally likely; the rollouts say -4 to -7.
    assert sum(differences) / len(differences) < 2.5
    of_batch = next(each["groups"] for each in reader.batches()["batches"] if each["batch"] == 1)
    marked = {each["group"] for each in of_batch if each["recorded"]}
    assert (
        marked == {row["group"] for row in rows if row["batch"] == 1} < {each["group"] for each in of_batch}
    )
    every = [row for row in rows if row["batch"] == 1 and row["group"] == of_first]
    assert len(every) == len(shown["sequences"])


def test_records_of_a_batch_are_found_also_when_the_file_became_the_older_one(tmp_path: Path) -> None:
    path = tmp_path / LOGPROBS_FILE
    path.write_text('{"batch": 3, "step": 3, "group": 1, "sequence": 0, "logprobs": [-0.5]}\n')
    records = RecordedLogprobs(tmp_path)
    assert records.of_group(3, 1) == {0: [-0.5]}
    assert records.of_group(3, 0) == {}
    assert list(records.groups(3)) == [1]
    assert not records.groups(4)
    path.rename(path.with_suffix(".older.jsonl"))
    path.write_text('{"batch": 4, "step": 4, "group": 0, "sequence": 2, "logprobs": [-1.5]}\n{"batch": 4, ')
    assert records.of_group(3, 1) == {0: [-0.5]}
    assert records.of_group(4, 0) == {2: [-1.5]}


def test_the_record_is_bounded_and_a_full_disk_costs_it_alone(
    tiny_model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "LARGEST_FILE", 1)
    run(tiny_model_directory, tmp_path / "run", make_bodies(3), steps=3)
    files = sorted(path.name for path in (tmp_path / "run").glob("token_logprobs*"))
    assert files == ["token_logprobs.older.jsonl"]
    lines = (tmp_path / "run" / files[0]).read_text().splitlines()
    assert {json.loads(line)["batch"] for line in lines} == {3}
    (tmp_path / "other" / LOGPROBS_FILE).mkdir(parents=True)  # nothing can be written there
    run(tiny_model_directory, tmp_path / "other", make_bodies(1), steps=1)


def test_nothing_is_recorded_where_no_group_is_wanted(tmp_path: Path) -> None:
    log = LogprobLog(tmp_path, groups=0)
    log.begin([])
    log.write(step=1, batch=1, set_aside=())
    assert not (tmp_path / LOGPROBS_FILE).exists()

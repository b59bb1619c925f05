"""What a page is told of a run: its state, its batches, and a group token by token."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from atropos_client.journal import Journal
from tests.trainer.batches import make_body
from tests.view.made_run import (
    body_of,
    group_of,
    make_run,
    step_row,
    write_configuration,
    write_journal,
    write_metrics,
)
from trainer.view.run_reader import NotThere, RunReader


def test_a_directory_without_anything_is_a_run_that_has_not_begun(tmp_path: Path) -> None:
    reader = RunReader(tmp_path)
    state = reader.state()
    assert (state["newest"], state["health"], state["batches"]) == ({}, None, {})
    assert reader.curves("step", [])["steps"] == []
    with pytest.raises(NotThere, match="keeps no journal"):
        reader.batches()


def test_the_state_is_of_the_newest_row_and_says_when_a_process_is_gone(tmp_path: Path) -> None:
    reader = RunReader(make_run(tmp_path / "run"))
    (tmp_path / "run/health.json").write_text('{"status": "ok", "phase": "training", "time": 1000.0}')
    state = reader.state()
    assert state["name"] == "run"
    assert (state["newest"]["step"], state["publish"]["version"], state["steps"]) == (5, 5, 100)
    assert state["batches"] == {"trained": 5}
    assert state["health"]["is_gone"]
    write_metrics(tmp_path / "run", [step_row(6)])
    assert reader.state()["newest"]["step"] == 6


def test_the_state_waits_for_no_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    program = (
        "import pathlib, sys; from trainer.view.run_reader import RunReader; "
        "assert RunReader(pathlib.Path(sys.argv[1])).state()['steps'] == 100; "
        "sys.exit(sorted({'torch', 'transformers'} & sys.modules.keys()) or 0)"
    )
    subprocess.run([sys.executable, "-c", program, str(run)], check=True)


def test_a_group_is_shown_as_it_was_trained(tmp_path: Path) -> None:
    write_configuration(tmp_path)
    group = group_of([7, 8, 9], [[1, 2], [1, 3, 4]], [1.0, 0.0])
    write_journal(tmp_path, [body_of(make_group_without_logprobs(), group)])
    shown = RunReader(tmp_path).group(1, 1)
    assert shown["prefix"]["ids"] == [7, 8, 9]
    first, second = shown["sequences"]
    assert (first["ids"], second["ids"]) == ([1, 2], [1, 3, 4])
    assert first["sampler"] == [-1.0, -2.0]
    assert first["advantages"] == [0.5, 0.5]
    assert (first["advantage"], second["advantage"]) == (0.5, -0.5)
    assert (first["trained"], first["trainer"]) == ([1, 1], None)
    assert shown["advantage_note"] == "group_center"
    assert first["text"] == ["1 ", "2 "]  # no tokenizer is known
    assert "--tokenizer" in shown["tokenizer"]


def test_what_the_page_cannot_compute_as_the_run_did_is_said(tmp_path: Path) -> None:
    data = {"advantage_estimator": "group_center", "advantage_normalization": "global"}
    write_configuration(tmp_path, data=data | {"advantage_clip": [-0.1, 0.1], "reward_kl_coefficient": 0.1})
    write_journal(tmp_path, [body_of(group_of([7], [[1], [2]], [1.0, 0.0]))])
    shown = RunReader(tmp_path).group(1, 0)
    assert [each["advantage"] for each in shown["sequences"]] == [0.5, -0.5]  # the run clips after dividing
    assert "deviation of all steps so far, and any clip after it" in shown["advantage_note"]
    assert "without the KL to the reference" in shown["advantage_note"]


def make_group_without_logprobs() -> dict[str, object]:
    return {**group_of([5], [[6], [6]], [0.0, 0.0]), "inference_logprobs": None}


def test_a_shared_prefix_ends_before_the_first_trained_token(tmp_path: Path) -> None:
    write_journal(tmp_path, [body_of(group_of([7], [[1, 2], [1, 2]], [1.0, 0.0]))])
    shown = RunReader(tmp_path).group(1, 0)
    assert shown["prefix"]["ids"] == [7]
    assert [each["ids"] for each in shown["sequences"]] == [[1, 2], [1, 2]]
    assert shown["sequences"][0]["advantages"] is None
    assert "no checkpoint" in shown["advantage_note"]


def test_an_estimator_that_a_run_names_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "bomb.py").write_text("raise SystemExit('went off')")
    write_configuration(tmp_path, data={"advantage_estimator": "bomb:estimate"})
    write_journal(tmp_path, [make_body(0)])
    shown = RunReader(tmp_path).group(1, 0)
    assert shown["sequences"][0]["advantages"] is None
    assert "bomb:estimate is not one of ours" in shown["advantage_note"]


def test_groups_that_were_set_aside_have_their_reason_and_no_advantage(tmp_path: Path) -> None:
    write_configuration(tmp_path)
    write_journal(tmp_path, [body_of(group_of([1], [[2], [3]], [1.0, 0.0]), {"tokens": "none"})])
    (tmp_path / "set_aside").mkdir()
    line = {"batch": 1, "group_index": 0, "env_id": 0, "reason": "token id 9 is too large", "group": {}}
    (tmp_path / "set_aside/groups.jsonl").write_text(json.dumps(line) + "\n")
    reader = RunReader(tmp_path)
    (batch,) = reader.batches()["batches"]
    assert batch["groups"][0]["reason"] == "token id 9 is too large"
    assert "tokens" in batch["groups"][1]["reason"]
    assert reader.group(1, 0)["sequences"][0]["advantages"] is None
    assert json.loads(reader.group(1, 1)["raw"]) == {"tokens": "none"}
    assert reader.state()["reasons"] == {"token id N is too large": 1}
    with pytest.raises(NotThere, match="none at place 2"):
        reader.group(1, 2)


def test_a_large_journal_is_read_by_number_and_left_as_it_is(tmp_path: Path) -> None:
    body = make_body(0, groups=1)
    with Journal.open(tmp_path / "journal") as journal:
        # The rows of 2,000 batches in one transaction: each append by itself waits for the disk.
        journal.append(body, served_version=0)
        with journal._writing() as connection:
            connection.executemany(
                "INSERT INTO batches (received_at, served_version, size, sha256) "
                "SELECT received_at, served_version, size, sha256 FROM batches WHERE number = ?",
                [(1,)] * 1999,
            )
            connection.execute(
                "INSERT INTO bodies SELECT number, (SELECT zlib FROM bodies) FROM batches WHERE number > 1"
            )
            from atropos_client.journal._ledger import SEAL

            connection.execute(f"{SEAL} > 1")
        journal.settle(2000, "trained", step=1)
    before = (tmp_path / "journal/journal.sqlite3").read_bytes()
    reader = RunReader(tmp_path)
    newest = reader.batches(limit=10)
    assert [each["batch"] for each in newest["batches"]] == list(range(2000, 1990, -1))
    assert newest["next"] == 1991
    assert [each["batch"] for each in reader.batches(before=3)["batches"]] == [2, 1]
    assert [each["batch"] for each in reader.batches(outcome="trained")["batches"]] == [2000]
    assert reader.group(1000, 0)["sequences"]
    assert (tmp_path / "journal/journal.sqlite3").read_bytes() == before


def test_a_body_that_is_gone_or_damaged_is_said_so(tmp_path: Path) -> None:
    write_journal(tmp_path, [make_body(0), b"{nonsense", make_body(1)])
    with Journal.open(tmp_path / "journal") as journal:
        journal.prune(1)
    reader = RunReader(tmp_path)
    third, second, first = reader.batches()["batches"]
    assert third["groups"]
    assert second["unreadable"]
    assert first["pruned"]
    with pytest.raises(NotThere, match="was pruned"):
        reader.group(1, 0)

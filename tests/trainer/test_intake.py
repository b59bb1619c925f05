"""Batches that are prepared while the step before them trains: order, failures, and exact resume."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from atropos_client.journal import Journal
from schemas import BatchReply
from tests.atropos_client.misbehaving_server import Answer, MisbehavingServer, eventually
from tests.trainer.batches import make_bodies, make_body
from tests.trainer.runs import assert_equal_tensors, rows, run, weights
from trainer import RunSummary, Trainer, load_config
from trainer.checkpoints.format import read_checkpoint
from trainer.errors import DataError, TooManySetAside
from trainer.run.build import build_trainer
from trainer.samples.prepare import PreparedBatch, prepare_batch

IN_MEMORY = ("--journal.enabled", "false")
GLOBAL = ("--data.advantage_normalization", "global")
EMPTY = Answer(body=b'{"batch":null}')


@pytest.fixture
def server() -> Iterator[MisbehavingServer]:
    with MisbehavingServer() as running:
        running.script("/", Answer(body=b'{"message":"AtroposLib API"}'))
        running.script("/register", Answer(body=b'{"uuid":1}'))
        running.script("/info", Answer(body=b'{"batch_size":4,"max_token_len":2048}'))
        running.script("/status", Answer(body=b'{"current_step":0,"queue_size":0}'))
        yield running


def run_from(
    server: MisbehavingServer,
    model: Path,
    output: Path,
    bodies: list[bytes],
    *options: str,
    steps: int,
    ahead: bool = True,
) -> RunSummary:
    """Train from a server; with `ahead`, no step but the first ends before all batches are prepared."""
    server.script("/batch", *(Answer(body=body) for body in bodies), EMPTY)
    config = load_config(
        None,
        [
            *("--model.path", str(model)),
            *("--atropos.url", server.url),
            *("--atropos.batch_size", "4"),
            *("--atropos.prefetch", "8"),
            *("--train.output_dir", str(output)),
            *("--train.steps", str(steps)),
            *("--train.device", "cpu"),
            *("--train.mixed_precision", "no"),
            *("--optimizer.learning_rate", "1e-3"),
            *("--loss.name", "policy_gradient"),
            *("--checkpoint.every", "2"),
            *options,
        ],
        environment={},
    )

    def wait_for_all(row: dict[str, Any]) -> None:
        if ahead and row["kind"] == "step":
            eventually(lambda: prepared.count == len(bodies))

    trainer = build_trainer(config, on_row=wait_for_all)
    prepared = CountedPreparation(trainer)
    return trainer.run()


class CountedPreparation:
    """Counts the batches that a trainer's normalizer, which sees each of them once, has seen."""

    def __init__(self, trainer: Trainer) -> None:
        self.count = 0
        self._whole = trainer._prepared.normalizer.state_dict
        trainer._prepared.normalizer.state_dict = self._counted

    def _counted(self) -> dict[str, float]:
        self.count += 1
        return self._whole()


@pytest.mark.parametrize("options", [(), IN_MEMORY], ids=["journaled", "in memory"])
def test_batches_prepared_ahead_train_as_if_prepared_one_by_one(
    options: tuple[str, ...], server: MisbehavingServer, tiny_model_directory: Path, tmp_path: Path
) -> None:
    bodies = make_bodies(4)
    run(tiny_model_directory, tmp_path / "one", bodies, *GLOBAL)
    run_from(server, tiny_model_directory, tmp_path / "ahead", bodies, *GLOBAL, *options, steps=4)
    assert_equal_tensors(weights(tmp_path / "ahead/final"), weights(tmp_path / "one/final"))
    ahead, one = rows(tmp_path / "ahead"), rows(tmp_path / "one")
    assert [row["loss"] for row in ahead] == [row["loss"] for row in one]
    assert all(row["prepared_ahead"] for row in ahead)
    assert not any(row["prepared_ahead"] for row in one)
    assert all(row["preparing_seconds"] > 0 for row in ahead + one)
    assert ahead[0]["idle_seconds"] is None
    assert all(row["idle_seconds"] > 0 for row in ahead[1:])


@pytest.mark.parametrize("options", [(), IN_MEMORY], ids=["journaled", "in memory"])
def test_a_checkpoint_knows_nothing_of_batches_that_were_only_prepared(
    options: tuple[str, ...], server: MisbehavingServer, tiny_model_directory: Path, tmp_path: Path
) -> None:
    bodies = make_bodies(6)
    run(tiny_model_directory, tmp_path / "whole", bodies, *GLOBAL, steps=6)
    halves = tmp_path / "halves"
    # Six batches are prepared, three are trained.
    summary = run_from(server, tiny_model_directory, halves, bodies, *GLOBAL, *options, steps=3)
    kept = sorted((halves / "set_aside").glob("batch-*.json"))
    if options == IN_MEMORY:
        assert summary.counters["batches_unused"] == 3
        assert [path.read_bytes() for path in kept] == bodies[3:]
        to_come = bodies[3:]
    else:
        assert kept == []
        with Journal.read_only(halves / "journal") as journal:
            assert [(e.outcome, e.step) for e in journal.ledger()] == [
                *[("trained", 1), ("trained", 2), ("trained", 3)],
                *[("received", None)] * 3,
            ]
        to_come = []  # the rest waits in the journal
    alone = tmp_path / "alone"
    run(tiny_model_directory, alone, bodies[:3], *GLOBAL, steps=3)
    states = [
        read_checkpoint(output / "checkpoints/step-000003").state.normalizer for output in (halves, alone)
    ]
    assert states[0] == states[1]
    run_from(server, tiny_model_directory, halves, to_come, *GLOBAL, *options, steps=6, ahead=False)
    newest = "checkpoints/step-000006"
    assert_equal_tensors(weights(halves / newest / "model"), weights(tmp_path / "whole" / newest / "model"))
    name = "optimizer.safetensors"
    assert_equal_tensors(load_file(halves / newest / name), load_file(tmp_path / "whole" / newest / name))


def test_a_batch_that_ends_the_run_ends_it_in_its_turn_is_kept_and_does_not_come_again(
    server: MisbehavingServer, tiny_model_directory: Path, tmp_path: Path
) -> None:
    bare = make_body(9, env_id=4, inference_logprobs=None)
    first, last = make_bodies(2)
    # The checkpoint of step 1 is there already when the batch fails.
    every = ("--checkpoint.every", "1", "--train.set_aside_window", "1")
    with pytest.raises(TooManySetAside, match="3 x no inference_logprobs"):
        run_from(server, tiny_model_directory, tmp_path, [first, bare, last], *every, steps=3, ahead=False)
    assert [row["step"] for row in rows(tmp_path)] == [1]
    assert (tmp_path / "set_aside/batch-000002.json").read_bytes() == bare
    assert read_checkpoint(tmp_path / "checkpoints/step-000001").state.batches == 2
    run_from(server, tiny_model_directory, tmp_path, [], *every, steps=2, ahead=False)
    with Journal.read_only(tmp_path / "journal") as journal:
        assert [(e.outcome, e.step) for e in journal.ledger()] == [
            ("trained", 1),
            ("set_aside", None),
            ("trained", 2),
        ]


def test_without_a_journal_what_was_fetched_ahead_is_kept_when_the_run_fails(
    server: MisbehavingServer, tiny_model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, bad, last = make_body(0), make_body(9, env_id=4), make_body(1)

    def fail_on_environment_4(reply: BatchReply, **options: Any) -> PreparedBatch:
        if reply.groups[0].env_id == 4:
            raise DataError("unforeseen")
        return prepare_batch(reply, **options)

    monkeypatch.setattr("trainer.run.optimizer_step.prepare_batch", fail_on_environment_4)
    with pytest.raises(DataError, match="unforeseen"):
        run_from(server, tiny_model_directory, tmp_path, [first, bad, last], *IN_MEMORY, steps=3, ahead=False)
    assert (tmp_path / "set_aside/batch-000002.json").read_bytes() == bad
    assert (tmp_path / "set_aside/batch-000003.json").read_bytes() == last
    assert (tmp_path / "checkpoints/step-000001/state.json").is_file()


def test_what_a_resumed_run_does_again_is_written_down_once(
    server: MisbehavingServer, tiny_model_directory: Path, tmp_path: Path
) -> None:
    first, last = make_bodies(2)
    flat = make_body(5, scores=[0.5] * 4)
    mixed = json.loads(last)
    mixed["batch"][0]["masks"][0] = [-100]  # ragged
    output = tmp_path / "run"
    bodies = [first, flat, json.dumps(mixed).encode()]
    run_from(server, tiny_model_directory, output, bodies, steps=2, ahead=False)
    # As after a kill that came before the last checkpoint.
    shutil.rmtree(output / "checkpoints/step-000002")
    run_from(server, tiny_model_directory, output, [], steps=2, ahead=False)
    assert [row["batch"] for row in rows(output)] == [1, 3]
    assert [row["batch"] for row in rows(output, "skipped")] == [2]
    groups = [json.loads(line) for line in (output / "set_aside/groups.jsonl").read_text().splitlines()]
    assert [group["batch"] for group in groups] == [3]
    with Journal.read_only(output / "journal") as journal:
        assert [entry.outcome for entry in journal.ledger()] == ["trained", "skipped", "trained"]


def test_settings_for_the_age_of_batches_are_warned_of_where_no_batch_has_one(
    server: MisbehavingServer, tiny_model_directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def warned_of(name: str, *options: str) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            run_from(server, tiny_model_directory, tmp_path / name, make_bodies(1), *options, steps=1)
        return [message for message in caplog.messages if "no batch has an age" in message]

    assert warned_of("neither", "--loss.staleness_discount", "1") == []
    (warning,) = warned_of("both", "--loss.max_staleness", "2", "--loss.staleness_discount", "0.5")
    assert warning.startswith("loss.max_staleness and loss.staleness_discount: no effect")
    (warning,) = warned_of("proximal", "--loss.name", "decoupled_ppo", "--loss.proximal", "interpolated")
    assert warning.startswith("loss.proximal: no effect")

"""Batches that are prepared while the step before them trains: order, failures, and exact resume."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.atropos_client.misbehaving_server import Answer, MisbehavingServer, eventually
from tests.trainer.batches import make_bodies, make_body
from tests.trainer.runs import assert_equal_tensors, rows, run, weights
from trainer import RunSummary, load_config
from trainer.assembly import build_trainer
from trainer.checkpoint import read_checkpoint
from trainer.errors import MissingLogProbsError

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
            # An empty reply comes only after the last batch has been prepared and handed over.
            eventually(lambda: len(server.paths("/batch")) > len(bodies))

    return build_trainer(config, on_row=wait_for_all).run()


def test_batches_prepared_ahead_train_as_if_prepared_one_by_one(
    server: MisbehavingServer, tiny_model_directory: Path, tmp_path: Path
) -> None:
    bodies = make_bodies(4)
    run(tiny_model_directory, tmp_path / "one", bodies, *GLOBAL)
    run_from(server, tiny_model_directory, tmp_path / "ahead", bodies, *GLOBAL, steps=4)
    assert_equal_tensors(weights(tmp_path / "ahead/final"), weights(tmp_path / "one/final"))
    ahead, one = rows(tmp_path / "ahead"), rows(tmp_path / "one")
    assert [row["loss"] for row in ahead] == [row["loss"] for row in one]
    assert all(row["prepared_ahead"] for row in ahead)
    assert not any(row["prepared_ahead"] for row in one)
    assert all(row["preparing_seconds"] > 0 for row in ahead + one)
    assert ahead[0]["idle_seconds"] is None
    assert all(row["idle_seconds"] > 0 for row in ahead[1:])


def test_a_checkpoint_knows_nothing_of_batches_that_were_only_prepared(
    server: MisbehavingServer, tiny_model_directory: Path, tmp_path: Path
) -> None:
    bodies = make_bodies(6)
    run(tiny_model_directory, tmp_path / "whole", bodies, *GLOBAL, steps=6)
    halves = tmp_path / "halves"
    # Six batches are prepared, three are trained.
    summary = run_from(server, tiny_model_directory, halves, bodies, *GLOBAL, steps=3)
    assert summary.counters["batches_unused"] == 3
    kept = sorted((halves / "set_aside").glob("batch-*.json"))
    assert [path.read_bytes() for path in kept] == bodies[3:]
    alone = tmp_path / "alone"
    run(tiny_model_directory, alone, bodies[:3], *GLOBAL, steps=3)
    states = [
        read_checkpoint(output / "checkpoints/step-000003").state.normalizer for output in (halves, alone)
    ]
    assert states[0] == states[1]
    run_from(server, tiny_model_directory, halves, bodies[3:], *GLOBAL, steps=6)
    newest = "checkpoints/step-000006"
    assert_equal_tensors(weights(halves / newest / "model"), weights(tmp_path / "whole" / newest / "model"))
    name = "optimizer.safetensors"
    assert_equal_tensors(load_file(halves / newest / name), load_file(tmp_path / "whole" / newest / name))


def test_a_batch_that_cannot_be_prepared_ends_the_run_in_its_turn_and_is_kept(
    server: MisbehavingServer, tiny_model_directory: Path, tmp_path: Path
) -> None:
    bare = make_body(9, env_id=4, inference_logprobs=None)
    first, last = make_bodies(2)
    with pytest.raises(MissingLogProbsError, match="environment 4"):
        run_from(server, tiny_model_directory, tmp_path, [first, bare, last], steps=3)
    assert [row["step"] for row in rows(tmp_path)] == [1]
    assert (tmp_path / "set_aside/batch-000002.json").read_bytes() == bare
    assert (tmp_path / "set_aside/batch-000003.json").read_bytes() == last
    assert (tmp_path / "checkpoints/step-000001/state.json").is_file()

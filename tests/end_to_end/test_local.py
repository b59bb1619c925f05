"""The whole loop on real parts: Atropos API, Atropos environment, inference server, trainer; a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from local_stack.records import newest_checkpoint, read_accuracy
from tests.end_to_end.conftest import Launch
from tests.end_to_end.launching import Launched

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def read_rows(run_dir: Path, kind: str = "step") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def read_report(run: Launched) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run.run_dir / "report.json").read_text())
    return report


def test_the_run_succeeds(finished_run: Launched) -> None:
    assert finished_run.process.returncode == 0, finished_run.output


def test_nothing_is_left_running(finished_run: Launched) -> None:
    assert finished_run.processes() == []


def test_every_publish_was_made_and_proven(finished_run: Launched) -> None:
    report = read_report(finished_run)
    assert report["publishes_made"] == report["publishes_verified"] == report["steps"] == 3
    rows = read_rows(finished_run.run_dir)
    assert [row["policy_version"] for row in rows] == [1, 2, 3]
    publishes = read_rows(finished_run.run_dir, "publish")
    assert [row["version"] for row in publishes if row["version"] > 0] == [1, 2, 3]
    assert all(row["publish_verified"] is True for row in publishes)


def test_the_report_holds_what_was_promised(finished_run: Launched) -> None:
    report = read_report(finished_run)
    assert {"heldout_before", "heldout_after", "seconds", "seed", "model", "machine"} <= set(report)
    assert 0 <= report["heldout_before"] <= 1
    assert 0 <= report["heldout_after"] <= 1
    assert report["seed"] == 5
    assert report["seconds"] > 0
    assert report["rewards"] == [row["reward_mean"] for row in read_rows(finished_run.run_dir)]
    with Image.open(finished_run.run_dir / "report.png") as picture:
        assert picture.size == (1600, 900)


def test_the_terminal_shows_each_step_and_the_result(finished_run: Launched) -> None:
    for part in (
        "held-out score before training",
        "step 1/3",
        "step 3/3",
        "published in",
        "verified",
        "3 versions, 3 proven to be served",
        str(finished_run.run_dir / "final"),
    ):
        assert part in finished_run.output


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_held_out_score_is_of_192_sampled_replies(finished_run: Launched, when: str) -> None:
    directory = finished_run.run_dir / "evaluations" / when
    written = json.loads((directory / "metrics.json").read_text())
    samples = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]
    assert written["results"]["all"]["replies"] == len(samples) == 48 * 4
    assert written["config_general"]["generation_parameters"]["temperature"] == 1.0
    accuracy = sum(sample["score"] == 1.0 for sample in samples) / len(samples)
    assert written["results"]["all"]["accuracy"] == accuracy == read_report(finished_run)[f"heldout_{when}"]
    assert len({sample["reply"] for sample in samples}) > 1


def test_each_step_trained_on_a_whole_batch_of_the_sampler_own_log_probs(finished_run: Launched) -> None:
    for row in read_rows(finished_run.run_dir):
        assert row["sequences"] == 96
        assert row["groups"] == 12
        assert row["set_aside_groups"] == 0
        assert 96 <= row["trained_tokens"] <= 96 * 16
        assert row["tokens_per_second"] > 0
        # Sampler and trainer see the same weights up to staleness; anything more is a misalignment.
        assert 0 <= row["mismatch_kl"] < 1e-3
        assert row["loss"] is not None
        assert row["grad_norm"] > 0


def test_the_final_model_is_an_ordinary_checkpoint_that_has_learned_something(finished_run: Launched) -> None:
    final = AutoModelForCausalLM.from_pretrained(finished_run.run_dir / "final")
    base = AutoModelForCausalLM.from_pretrained(finished_run.run_dir / "base-model")
    tokenizer = AutoTokenizer.from_pretrained(finished_run.run_dir / "final")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "1+1"}], tokenize=False)
    base_weights = base.state_dict()
    assert final.state_dict().keys() == base_weights.keys()
    changed = [
        name for name, tensor in final.state_dict().items() if not torch.equal(tensor, base_weights[name])
    ]
    assert changed
    assert all(torch.isfinite(tensor).all() for tensor in final.state_dict().values())


def test_an_interrupted_run_leaves_a_checkpoint_and_nothing_else_and_goes_on_from_it(
    launch: Launch, tiny_model_directory: Path
) -> None:
    words = ("--model", str(tiny_model_directory))
    run = launch(*words, "--steps", "100000")
    run.wait_until(lambda: run.steps_done() >= 1, "the first step was done")
    run.interrupt()
    assert run.wait() == 130
    assert run.processes() == []

    checkpoint = newest_checkpoint(run.run_dir)
    assert checkpoint is not None
    done = json.loads((checkpoint / "state.json").read_text())["step"]
    assert done >= run.steps_done() >= 1
    AutoModelForCausalLM.from_pretrained(checkpoint / "model")
    assert f"The newest checkpoint is {checkpoint}" in run.output
    assert "go on from it: atropos-train local" in run.output
    assert not (run.run_dir / "report.json").exists()

    again = launch(*words, "--steps", str(done + 1))
    assert again.wait() == 0, again.output
    rows = read_rows(again.run_dir)
    assert [row["step"] for row in rows] == list(range(1, done + 2))
    # Measured once, by the first session.
    assert read_report(again)["heldout_before"] == read_accuracy(run.run_dir / "evaluations" / "before")
    assert again.output.count("measuring") == 1
    assert again.processes() == []


def test_the_death_of_a_service_ends_the_run_and_is_told(launch: Launch, tiny_model_directory: Path) -> None:
    run = launch("--model", str(tiny_model_directory), "--steps", "100000")
    run.wait_until(lambda: run.steps_done() >= 1, "the first step was done")
    run.process_of("local_stack.inference").kill()
    assert run.wait() == 1
    assert "The run failed: the inference server was ended by SIGKILL." in run.output
    assert "The end of its log" in run.output
    assert newest_checkpoint(run.run_dir) is not None
    assert run.processes() == []

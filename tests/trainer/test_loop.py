"""The run as a whole, on recorded batches and a real tiny model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.forked import run_module
from tests.trainer.batches import make_bodies, make_body, make_group
from tests.trainer.runs import assert_equal_tensors, rows, run, weights
from trainer.errors import ConfigurationError, TooManySkippedBatches
from trainer.publish.errors import PublishError
from trainer.run.publish_schedule import PublishSchedule


def test_a_run_changes_the_weights_and_leaves_metrics_checkpoints_and_a_final_model(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    summary = run(tiny_model_directory, tmp_path, make_bodies(4))
    assert summary.step == 4
    assert summary.stopped_early is None
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000002",
        "step-000004",
    ]
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final").state_dict()
    base = AutoModelForCausalLM.from_pretrained(tiny_model_directory).state_dict()
    assert all(not torch.equal(final[name], base[name]) for name in base)


def test_every_step_row_carries_the_numbers_that_are_promised(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    run(tiny_model_directory, tmp_path, make_bodies(1), steps=1)
    (row,) = rows(tmp_path)
    promised = {
        "loss",
        "reward_mean",
        "reward_std",
        "advantage_mean",
        "advantage_std",
        "ratio",
        "mismatch_kl",
        "capped",
        "entropy",
        "grad_norm",
        "learning_rate",
        "tokens_per_second",
        "total_tokens_per_second",
        "trained_tokens",
        "padding_share",
        "prefix_tokens_saved_share",
        "staleness",
        "served_version",
        "waiting_seconds",
        "training_seconds",
        "set_aside_groups",
        "set_aside_groups_total",
        "groups_without_spread",
    }
    assert promised <= row.keys()
    assert row["prefix_tokens_saved_share"] > 0
    assert row["staleness"] == 0


def test_resuming_equals_the_uninterrupted_run_bit_for_bit(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    bodies = make_bodies(6)
    options = ("--data.advantage_normalization", "global", "--optimizer.schedule", "cosine")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run(tiny_model_directory, whole, bodies, *options, steps=6)

    def interrupted_after(count: int):
        yield from bodies[:count]

    first = run(tiny_model_directory, halves, interrupted_after(3), *options, steps=6)
    assert first.stopped_early == "there are no more batches"
    second = run(tiny_model_directory, halves, bodies[3:], *options, steps=6)
    assert second.step == 6
    newest = "checkpoints/step-000006"
    assert_equal_tensors(weights(halves / newest / "model"), weights(whole / newest / "model"))
    name = "optimizer.safetensors"
    assert_equal_tensors(load_file(halves / newest / name), load_file(whole / newest / name))
    assert [row["loss"] for row in rows(halves)] == [row["loss"] for row in rows(whole)]


def test_a_step_whose_publish_ends_the_run_has_its_row(
    tiny_model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_at_the_third(_: PublishSchedule, step: int) -> None:
        if step == 3:
            raise PublishError("version 2 is not served")

    bodies = make_bodies(4)
    with monkeypatch.context() as patched:
        patched.setattr(PublishSchedule, "publish", fails_at_the_third)
        with pytest.raises(PublishError):
            run(tiny_model_directory, tmp_path, bodies)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    run(tiny_model_directory, tmp_path, bodies)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_adapters_resume_bit_for_bit_and_merge_into_an_ordinary_model(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    lora = ("--model.lora.rank", "4", "--model.lora.dropout", "0.1")
    bodies = make_bodies(4)
    run(tiny_model_directory, tmp_path / "whole", bodies, *lora)
    run(tiny_model_directory, tmp_path / "halves", bodies[:2], *lora)
    run(tiny_model_directory, tmp_path / "halves", bodies[2:], *lora)
    assert_equal_tensors(weights(tmp_path / "halves/final"), weights(tmp_path / "whole/final"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole/final")
    assert sum("lora" in name for name in merged.state_dict()) == 0
    run(tiny_model_directory, tmp_path / "other", bodies, *lora, "--train.seed", "1")
    whole, other = weights(tmp_path / "whole/final"), weights(tmp_path / "other/final")
    assert any(not torch.equal(whole[name], other[name]) for name in whole), "the seed counts"
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"]
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors", ".jinja", ".md"}
    pickles = [path for path in files if path.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x04")]
    assert pickles == []


def test_results_do_not_depend_on_packing_or_token_budget(tiny_model_directory: Path, tmp_path: Path) -> None:
    for name, options in {
        "tree": ("--data.packing", "prefix_tree"),
        "padded": ("--data.packing", "padded"),
        "small": ("--data.tokens_per_micro_batch", "20"),
    }.items():
        run(tiny_model_directory, tmp_path / name, make_bodies(1), *options, steps=1)
    losses = {name: rows(tmp_path / name)[0] for name in ("tree", "padded", "small")}
    assert losses["small"]["micro_batches"] > losses["tree"]["micro_batches"]
    for row in losses.values():
        assert row["loss"] == pytest.approx(losses["padded"]["loss"], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(losses["padded"]["grad_norm"], rel=1e-4)


def test_learning_rate_zero_changes_nothing(tiny_model_directory: Path, tmp_path: Path) -> None:
    run(tiny_model_directory, tmp_path, make_bodies(2), "--optimizer.learning_rate", "0", steps=2)
    assert_equal_tensors(weights(tmp_path / "final"), weights(tiny_model_directory))


@pytest.mark.parametrize("loss", ["weighted_sft", "policy_gradient", "ppo_clip"])
def test_every_loss_raises_the_log_prob_of_what_was_rewarded(
    loss: str, tiny_model_directory: Path, tmp_path: Path
) -> None:
    body = make_body(5, groups=1, scores=[1.0, 0.0, 0.0, 0.0])
    generous = ("--loss.epsilon_high", "1e6") if loss == "ppo_clip" else ()
    run(tiny_model_directory, tmp_path, [body] * 6, "--loss.name", loss, *generous, steps=6)
    tokens = json.loads(body)["batch"][0]["tokens"][0]
    mask = json.loads(body)["batch"][0]["masks"][0]

    def log_prob(directory: Path) -> float:
        model = AutoModelForCausalLM.from_pretrained(directory)
        with torch.no_grad():
            scores = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        return sum(float(scores[t - 1, tokens[t]]) for t in range(1, len(tokens)) if mask[t] != -100)

    assert log_prob(tmp_path / "final") > log_prob(tiny_model_directory) + 0.1


def test_bad_groups_are_set_aside_with_a_reason_and_the_rest_is_trained(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    generator = random.Random(1)
    ragged = make_group(generator, env_id=7)
    ragged["masks"][2] = ragged["masks"][2][:-1]
    foreign = make_group(generator, env_id=8)
    foreign["tokens"][0][0] = 5000
    good = make_group(generator)
    run(tiny_model_directory, tmp_path, [json.dumps({"batch": [ragged, good, foreign]}).encode()], steps=1)
    (row,) = rows(tmp_path)
    assert row["set_aside_groups"] == 2
    assert row["groups"] == 1
    kept = [json.loads(line) for line in (tmp_path / "set_aside/groups.jsonl").read_text().splitlines()]
    assert {group["env_id"] for group in kept} == {7, 8}
    assert any("vocabulary" in group["reason"] for group in kept)
    assert any("masks[2]" in group["reason"] for group in kept)
    assert kept[0]["group"]["tokens"] == ragged["tokens"]


def test_groups_without_spread_do_not_shift_the_denominator(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    generator = random.Random(3)
    spread, flat = make_group(generator), make_group(generator, scores=[0.5] * 4)
    center = ("--data.advantage_estimator", "group_center")
    run(
        tiny_model_directory,
        tmp_path / "both",
        [json.dumps({"batch": [spread, flat]}).encode()],
        *center,
        steps=1,
    )
    run(
        tiny_model_directory, tmp_path / "alone", [json.dumps({"batch": [spread]}).encode()], *center, steps=1
    )
    (both,), (alone,) = rows(tmp_path / "both"), rows(tmp_path / "alone")
    assert both["groups_without_spread"] == 1
    assert both["computed_tokens"] == alone["computed_tokens"]
    assert both["loss"] * both["trained_tokens"] == pytest.approx(
        alone["loss"] * alone["trained_tokens"], rel=1e-5
    )


def test_a_batch_that_makes_the_loss_infinite_is_skipped_kept_and_counted(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    bodies = make_bodies(3)
    bodies[1] = make_body(9, advantages=None, scores=[1e38, -1e38, 1e38, 3e37])
    options = ("--data.advantage_estimator", "raw", "--loss.name", "weighted_sft")
    options += ("--data.advantage_limit", "1e39")
    summary = run(tiny_model_directory, tmp_path, bodies, *options, steps=2)
    assert summary.step == 2
    (skipped,) = rows(tmp_path, "skipped")
    assert "not finite" in skipped["reason"]
    assert summary.counters["batches_not_finite"] == 1
    assert (tmp_path / "set_aside/batch-000002.json").read_bytes() == bodies[1]
    final = weights(tmp_path / "final")
    assert all(bool(tensor.isfinite().all()) for tensor in final.values())


def test_too_many_untrainable_batches_in_a_row_end_the_run_with_a_checkpoint(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    flat = make_body(1, scores=[0.5] * 4)
    bodies = [*make_bodies(1), *[flat] * 5]
    with pytest.raises(TooManySkippedBatches, match="3 batches in a row"):
        run(tiny_model_directory, tmp_path, bodies, "--train.max_consecutive_skips", "3")
    assert (tmp_path / "checkpoints/step-000001/state.json").is_file()


def test_batches_of_an_environment_without_log_probs_are_skipped_within_the_limits(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    bare = make_body(1, env_id=4, inference_logprobs=None)
    summary = run(
        tiny_model_directory, tmp_path / "mixed", [bare, *make_bodies(1), bare, make_body(5)], steps=2
    )
    assert summary.step == 2
    assert [row["batch"] for row in rows(tmp_path / "mixed", "skipped")] == [1, 3]
    with pytest.raises(TooManySkippedBatches, match=r"environment 4.*no inference_logprobs.*ManagedServer"):
        run(tiny_model_directory, tmp_path / "never", [bare] * 10)
    sft = run(tiny_model_directory, tmp_path / "sft", [bare], "--loss.name", "weighted_sft", steps=1)
    assert sft.step == 1


def test_resume_never_refuses_a_directory_that_holds_a_run(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    run(tiny_model_directory, tmp_path, make_bodies(2), steps=2)
    with pytest.raises(ConfigurationError, match=r"train\.resume"):
        run(tiny_model_directory, tmp_path, make_bodies(2), "--train.resume", "never", steps=2)


def test_gradient_checkpointing_changes_memory_not_results(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    run(tiny_model_directory, tmp_path / "plain", make_bodies(2), steps=2)
    recompute = ("--model.gradient_checkpointing", "true")
    run(tiny_model_directory, tmp_path / "recomputed", make_bodies(2), *recompute, steps=2)
    for ours, theirs in zip(rows(tmp_path / "recomputed"), rows(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_bfloat16_autocast_trains_close_to_float32_and_keeps_float32_weights(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    run(tiny_model_directory, tmp_path / "full", make_bodies(1), "--train.mixed_precision", "no", steps=1)
    with pytest.raises(ConfigurationError, match="Accelerate keeps one a process: start another process"):
        run(tiny_model_directory, tmp_path / "second", make_bodies(1), "--train.mixed_precision", "bf16")
    words = [tiny_model_directory, tmp_path / "mixed", 0, 1, "--train.mixed_precision", "bf16"]
    run_module("tests.trainer.multiprocess_run", *words).check_returncode()
    (full,), (mixed,) = rows(tmp_path / "full"), rows(tmp_path / "mixed")
    assert mixed["negative_logprob"] != full["negative_logprob"]
    assert mixed["negative_logprob"] == pytest.approx(full["negative_logprob"], rel=0.02)
    assert {
        tensor.dtype for tensor in weights(tmp_path / "mixed/checkpoints/step-000001/model").values()
    } == {torch.float32}

"""Objectives in real runs: however a step is packed and cut, how old its samples are, how much is masked."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.trainer.batches import make_bodies
from tests.trainer.runs import rows, run
from trainer.errors import ConfigurationError
from trainer.extensions import BUILT_IN_LOSSES

WIDER = ("--loss.epsilon_low", "0.1", "--loss.epsilon_high", "0.2")
OPTIONS = {
    "gspo": WIDER,
    "luspo": WIDER,
    "clip_cov": ("--loss.covariance_share", "0.2", "--loss.covariance_low", "0"),
    "kl_cov": ("--loss.covariance_share", "0.2"),
    "weighted_sft": (
        *("--loss.correction.weight", "sequence_tis", "--loss.correction.reject", "sequence_mean"),
        *("--loss.correction.reject_above", "1"),
    ),
}
CUTS = {
    "prefix_tree": ("--data.packing", "prefix_tree"),
    "padded": ("--data.packing", "padded", "--data.tokens_per_micro_batch", "20"),
}


@pytest.mark.parametrize("loss", BUILT_IN_LOSSES)
def test_a_step_does_not_depend_on_how_it_is_packed_and_cut(
    loss: str, tiny_model_directory: Path, tmp_path: Path
) -> None:
    found = {}
    for name, cut in CUTS.items():
        options = ("--loss.name", loss, "--loss.reduction", "sequence", *OPTIONS.get(loss, ()), *cut)
        run(tiny_model_directory, tmp_path / name, make_bodies(1), *options, steps=1)
        (found[name],) = rows(tmp_path / name)
    whole, parts = found["prefix_tree"], found["padded"]
    assert parts["micro_batches"] > whole["micro_batches"]
    assert whole["grad_norm"] > 0
    measured = {"clipped", "masked", "capped", "sequence_ratio", "sequence_weight", "correction_weight"}
    measured |= {"gate", "penalized", "effective_sample_share"}
    for name in ("loss", "grad_norm", *measured & whole.keys()):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name
    assert measured & whole.keys()


def test_a_token_sum_is_the_mean_times_the_tokens(tiny_model_directory: Path, tmp_path: Path) -> None:
    run(tiny_model_directory, tmp_path / "mean", make_bodies(1), steps=1)
    run(tiny_model_directory, tmp_path / "sum", make_bodies(1), "--loss.reduction", "token_sum", steps=1)
    (mean,), (total,) = rows(tmp_path / "mean"), rows(tmp_path / "sum")
    for name in ("loss", "grad_norm"):
        assert total[name] == pytest.approx(mean[name] * mean["trained_tokens"], rel=1e-5)


def test_batches_of_too_old_versions_are_skipped_and_counted(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    """The recording says that version 0 was served for all of them."""
    run(tiny_model_directory, tmp_path, make_bodies(4), "--loss.max_staleness", "1")
    assert [row["staleness"] for row in rows(tmp_path)] == [0, 1]
    skipped = rows(tmp_path, "skipped")
    assert [row["reason"] for row in skipped] == ["it is 2 versions old (loss.max_staleness 1)"] * 2
    assert skipped[-1]["stale_groups_total"] == 6
    assert skipped[-1]["batches_stale"] == 2


def test_older_batches_weigh_less(tiny_model_directory: Path, tmp_path: Path) -> None:
    still = ("--optimizer.learning_rate", "0")  # the second step is computed on the same weights
    body = make_bodies(1)[0]
    run(tiny_model_directory, tmp_path, [body, body], *still, "--loss.staleness_discount", "0.5", steps=2)
    first, second = rows(tmp_path)
    assert second["staleness"] == 1
    for name in ("loss", "grad_norm"):
        assert second[name] == pytest.approx(first[name] / 2, rel=1e-5)


def test_an_interpolated_proximal_policy_widens_the_clip_with_the_age(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    """The same weights at each step: only the age that is taken for the batch's grows."""
    bodies = make_bodies(1) * 4
    options = ("--optimizer.learning_rate", "0", "--loss.epsilon_low", "0.6", "--loss.epsilon_high", "1")
    names = {"plain": ("ppo_clip",), "interpolated": ("decoupled_ppo", "--loss.proximal", "interpolated")}
    for name, loss in names.items():
        run(tiny_model_directory, tmp_path / name, bodies, "--loss.name", *loss, *options, steps=4)
    plain, found = rows(tmp_path / "plain"), rows(tmp_path / "interpolated")
    assert [row["staleness"] for row in found] == [0, 1, 2, 3]
    for step in (0, 1):
        assert found[step]["grad_norm"] == pytest.approx(plain[step]["grad_norm"], rel=1e-5)
    clipped = [row["clipped"] for row in found]
    assert clipped[1] == plain[1]["clipped"] == plain[3]["clipped"]
    assert clipped[1] > clipped[2] > clipped[3]


def test_a_step_that_is_masked_for_the_most_part_warns_once_and_counts(
    tiny_model_directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    masking = ("--loss.correction.reject", "token", "--loss.correction.reject_above", "0.01")
    with caplog.at_level(logging.WARNING):
        run(tiny_model_directory, tmp_path / "masked", make_bodies(2), *masking, steps=2)
        run(tiny_model_directory, tmp_path / "wide", make_bodies(1), "--loss.name", "dppo_tv", steps=1)
    second = rows(tmp_path / "masked")[1]
    assert second["masked"] > 0.5
    assert second["masked_alarms_total"] == 2
    warnings = [record.getMessage() for record in caplog.records if "masked_alarm" in record.getMessage()]
    assert len(warnings) == 1
    assert "Batch 1: the loss and its correction mask" in warnings[0]
    assert rows(tmp_path / "wide")[0]["masked"] <= 0.5


def test_a_correction_is_compared_on_resume(tiny_model_directory: Path, tmp_path: Path) -> None:
    run(tiny_model_directory, tmp_path, make_bodies(2), steps=2)
    changed = ("--loss.correction.reject", "token", "--loss.max_staleness", "3")
    with pytest.raises(
        ConfigurationError, match=r"(?s)loss\.max_staleness.*loss\.correction: .*reject.*token"
    ):
        run(tiny_model_directory, tmp_path, make_bodies(3), *changed, steps=3)
    named = ("--train.resume_changes", "loss.correction,loss.max_staleness")
    assert run(tiny_model_directory, tmp_path, make_bodies(3), *changed, *named, steps=3).step == 3

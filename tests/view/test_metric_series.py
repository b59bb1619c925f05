"""Curves of runs of any length, from the file that the trainer writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.view.made_run import step_row, write_metrics
from trainer.view.metric_series import KEPT_ROWS, LARGEST_LINE, MetricSeries

STEPS = 100_000


@pytest.fixture(scope="module")
def long_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100,000 steps, with a publish every tenth, and one loss that stands out."""
    rows = (
        row
        for step in range(1, STEPS + 1)
        for row in (
            step_row(step, loss=99.0 if step == 54_321 else -0.5),
            *(
                [{"kind": "publish", "step": step, "version": step, "publish_seconds": 1.0}]
                * (step % 10 == 0)
            ),
        )
    )
    return write_metrics(tmp_path_factory.mktemp("long"), rows)


def test_a_long_run_is_sampled_within_bounds_and_whole_in_range(long_file: Path) -> None:
    metrics = MetricSeries(long_file)
    metrics.read_new()
    series = metrics.series["step"]
    assert KEPT_ROWS <= len(series.steps) < 2 * KEPT_ROWS
    assert len(metrics.series["publish"].steps) < 2 * KEPT_ROWS
    sampled = series.sampled(["reward_mean"], first=None, last=None, points=500)
    curve = sampled["columns"]["reward_mean"]
    assert len(sampled["steps"]) == len(curve["mean"]) == 500
    assert sampled["every"] == series.stride > 1
    assert sampled["steps"][-1] > STEPS - 2 * series.stride
    # The reward rises by 0.001 a step: each mean lies where its steps do.
    for step, low, mean, high in zip(
        sampled["steps"], curve["low"], curve["mean"], curve["high"], strict=True
    ):
        assert low <= mean <= high <= step / 1000
        assert step / 1000 - mean < STEPS / 500 / 1000 * 1.5
    assert metrics.newest["step"] == STEPS


def test_zooming_in_reads_every_step_of_the_range(long_file: Path) -> None:
    metrics = MetricSeries(long_file)
    metrics.read_new()
    window = metrics.window("step", 54_000, 55_000)
    zoomed = window.sampled(["loss"], first=54_000, last=55_000, points=2000)
    assert zoomed["steps"] == list(range(54_000, 55_001))
    assert zoomed["every"] == 1
    assert zoomed["columns"]["loss"]["mean"][321] == 99.0
    coarse = window.sampled(["loss"], first=54_000, last=55_000, points=10)
    assert max(coarse["columns"]["loss"]["high"]) == 99.0  # in the band, whatever the mean


def test_rows_are_read_as_they_are_written_and_anew_when_the_file_is_another(tmp_path: Path) -> None:
    metrics = MetricSeries(tmp_path / "metrics.jsonl")
    metrics.read_new()  # there is no file yet
    assert metrics.newest == {}
    path = write_metrics(tmp_path, [step_row(1), step_row(2)])
    metrics.read_new()
    assert list(metrics.series["step"].steps) == [1, 2]
    with path.open("a") as file:
        file.write('{"kind": "step", "step": 3, "lo')
    metrics.read_new()
    assert metrics.newest["step"] == 2  # the third is being written
    with path.open("a") as file:
        file.write('ss": 1.5}\n')
    metrics.read_new()
    assert metrics.newest == {"kind": "step", "step": 3, "loss": 1.5}
    path.rename(tmp_path / "before")
    write_metrics(tmp_path, [step_row(1)])
    metrics.read_new()
    assert list(metrics.series["step"].steps) == [1]


def test_what_is_no_row_is_counted_and_numbers_that_are_missing_are_gaps(tmp_path: Path) -> None:
    path = write_metrics(tmp_path, [step_row(1, own=1.0), step_row(2), step_row(3, own=3.0)])
    with path.open("a") as file:
        file.write("nonsense\n\n" + '{"kind": "step", "step": ' + "[" * 100_000 + "\n")
        file.write("x" * (LARGEST_LINE + 10) + "\n")
        file.write('{"kind": "skipped", "step": 3, "batch": 9, "reason": "<b>no</b>"}\n')
        file.write('{"kind": "step", "step": 4, "own": "text", "loss": 2}\n')
    metrics = MetricSeries(path)
    metrics.read_new()
    assert metrics.unreadable == 3
    assert metrics.skipped == [{"step": 3, "batch": 9, "reason": "<b>no</b>"}]
    sampled = metrics.series["step"].sampled(["own", "loss"], first=None, last=None, points=10)
    assert sampled["steps"] == [1, 2, 3, 4]
    assert sampled["columns"]["own"]["mean"] == [1.0, None, 3.0, None]
    assert sampled["columns"]["loss"]["mean"] == [-0.5, -0.5, -0.5, 2.0]

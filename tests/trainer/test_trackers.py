"""Experiment trackers over several starts of one run: one curve, the same run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainer.batches import make_bodies
from tests.trainer.runs import rows, run
from trainer.errors import ConfigurationError
from trainer.run.rollout_table import COLUMNS

TRACKERS = (
    *("--logging.trackers", "tensorboard,wandb", "--logging.project", "here"),
    *("--publish.token", "hunter2", "--atropos.token", "hush-hush"),
)


@pytest.mark.slow
def test_a_run_that_went_back_to_a_checkpoint_has_one_curve_and_stays_the_same_run(
    tiny_model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    output = tmp_path / "run"
    # As if it had died in step 4, of which the checkpoint at step 2 knows nothing.
    run(tiny_model_directory, output, make_bodies(3), *TRACKERS)
    (table,) = (tmp_path / "wandb").glob("offline-run-*/files/media/table/rollouts_*.table.json")
    check_table(table)
    shutil.rmtree(output / "checkpoints/step-000003")
    written_once = {path for path in (output / "here").iterdir() if path.is_dir()}
    run(tiny_model_directory, output, make_bodies(4)[2:], *TRACKERS)
    steps = rows(output)
    assert [row["step"] for row in steps] == [1, 2, 3, 4]

    curves = EventAccumulator(str(output / "here"))
    curves.Reload()
    losses = [(each.step, each.value) for each in curves.Scalars("loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in steps]
    # To TensorBoard the configuration is a run of its own.
    assert {path for path in (output / "here").iterdir() if path.is_dir()} == written_once

    runs = [path.name.rpartition("-")[2] for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert set(runs) == {(output / "tracker_run").read_text()}

    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"hunter2" in content or b"hush-hush" in content for content in written)

    # A new run in the same place is another one.
    shutil.rmtree(output / "checkpoints")
    run(tiny_model_directory, output, make_bodies(1), *TRACKERS, steps=1)
    assert (output / "tracker_run").read_text() not in runs


def check_table(path: Path) -> None:
    """The table of a first step has the best and the worst of its sequences, as texts."""
    written = json.loads(path.read_text())
    assert written["columns"] == list(COLUMNS)
    scores = [row[COLUMNS.index("score")] for row in written["data"]]
    everything = [score for group in json.loads(make_bodies(1)[0])["batch"] for score in group["scores"]]
    ranked = sorted(everything, reverse=True)
    assert len(ranked) > len(scores) == 8
    assert scores == pytest.approx([*ranked[:4], *ranked[-4:]])
    assert all(isinstance(row[-1], str) and row[-1] for row in written["data"])


def test_a_tracker_that_cannot_be_opened_is_refused_by_name(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "here").write_text("no directory")
    options = ("--logging.trackers", "tensorboard", "--logging.project", "here")
    with pytest.raises(
        ConfigurationError, match=r"logging\.trackers \(tensorboard\) cannot be opened: .*here"
    ):
        run(tiny_model_directory, tmp_path, make_bodies(1), *options, steps=1)

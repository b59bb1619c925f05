"""The directory of what was set aside: what it keeps, and that it does not grow for ever."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from tests.trainer.batches import make_body
from tests.trainer.runs import rows, run
from trainer.checkpoints.format import read_checkpoint
from trainer.samples.quarantine import QuarantineStore
from trainer.samples.validation import QuarantinedGroup

BOUND = 80_000


def bad(index: int = 0, size: int = 1000) -> QuarantinedGroup:
    return QuarantinedGroup(group_index=index, env_id=1, reason="bad", group="x" * size)


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def batches_kept(directory: Path) -> list[int]:
    lines = [line for path in directory.glob("groups*.jsonl") for line in path.read_text().splitlines()]
    return sorted(json.loads(line)["batch"] for line in lines)


def test_groups_stay_within_the_bound_and_the_oldest_go(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = QuarantineStore(tmp_path, max_bytes=BOUND)
    for batch in range(1, 301):
        store.keep_groups([bad()], batch=batch)
        assert size_of(tmp_path) <= BOUND
    kept = batches_kept(tmp_path)
    assert kept == list(range(kept[0], 301)), "the newest, without a gap"
    assert len(kept) > BOUND / 1100 * 0.8, "no more was deleted than had to be"
    assert store.pruned > 10
    assert "train.set_aside_max_bytes): deleted groups-000010.jsonl, its oldest file" in caplog.text


def test_whole_batches_and_groups_share_the_bound_by_age(tmp_path: Path) -> None:
    store = QuarantineStore(tmp_path, max_bytes=BOUND)
    for batch in range(1, 101):
        if batch % 2:
            store.keep_batch(b"y" * 5000, batch=batch, reason="bad")
        else:
            store.keep_groups([bad(size=4000)], batch=batch)
        assert size_of(tmp_path) <= BOUND
    whole = sorted(int(path.stem.removeprefix("batch-")) for path in tmp_path.glob("batch-*.json"))
    assert whole == list(range(whole[0], 101, 2))
    assert abs(whole[0] - batches_kept(tmp_path)[0]) < 8


def test_what_alone_is_larger_than_the_bound_is_not_kept_and_counted(tmp_path: Path) -> None:
    store = QuarantineStore(tmp_path, max_bytes=BOUND)
    store.keep_batch(b"y" * (BOUND + 1), batch=1, reason="bad")
    assert list(tmp_path.iterdir()) == []
    assert store.pruned == 1


def test_files_of_others_in_the_directory_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("z" * 2 * BOUND)
    store = QuarantineStore(tmp_path, max_bytes=BOUND)
    for batch in range(1, 101):
        store.keep_groups([bad()], batch=batch)
    assert (tmp_path / "notes.txt").stat().st_size == 2 * BOUND
    assert batches_kept(tmp_path)[-1] == 100


def test_a_resumed_run_drops_groups_of_later_batches_from_every_file(tmp_path: Path) -> None:
    store = QuarantineStore(tmp_path, max_bytes=BOUND)
    for batch in range(1, 41):
        store.keep_groups([bad()], batch=batch)
    resumed = QuarantineStore(tmp_path, max_bytes=BOUND)
    resumed.forget_after(15)
    assert batches_kept(tmp_path) == list(range(1, 16))
    for batch in range(16, 41):
        resumed.keep_groups([bad()], batch=batch)
    assert batches_kept(tmp_path) == list(range(1, 41))


def test_a_body_that_is_no_batch_is_kept_counted_and_not_a_skip_in_a_row(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    bodies = [b"[1]", b"\xff", b'{"batch":', make_body(1)]
    summary = run(tiny_model_directory, tmp_path, bodies, "--train.max_consecutive_skips", "1", steps=1)
    assert summary.counters["batches_unreadable"] == 3
    for number, body in enumerate(bodies[:3], start=1):
        assert (tmp_path / f"set_aside/batch-{number:06d}.json").read_bytes() == body
    found = rows(tmp_path, "skipped")
    assert [row["batch"] for row in found] == [1, 2, 3]
    assert all(row["reason"].startswith("unreadable: the reply is no BatchReply") for row in found)
    assert rows(tmp_path)[0]["set_aside_pruned_total"] == 0
    assert read_checkpoint(summary.checkpoint).state.batches == 4


def test_a_batch_that_cannot_be_kept_is_not_counted_by_the_checkpoint_of_the_run_that_it_ends(
    tiny_model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = [make_body(1), make_body(2, scores=[0.5] * 4)]
    setting = ("--data.advantage_normalization", "global")
    alone = run(tiny_model_directory, tmp_path / "alone", bodies[:1], *setting, steps=1)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(QuarantineStore, "keep_batch", full)
    with pytest.raises(OSError, match="No space left"):
        run(tiny_model_directory, tmp_path / "full", bodies, *setting, steps=2)
    ours = read_checkpoint(tmp_path / "full/checkpoints/step-000001").state
    theirs = read_checkpoint(alone.checkpoint).state
    assert (ours.batches, ours.counters, ours.normalizer) == (1, theirs.counters, theirs.normalizer)
    assert rows(tmp_path / "full", "skipped") == []


def test_the_bound_is_the_settings_and_its_deletions_are_in_every_row(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    bodies = [b"[" + b" " * 600_000, b"[" + b" " * 600_001, make_body(1)]
    run(tiny_model_directory, tmp_path, bodies, "--train.set_aside_max_bytes", str(1 << 20), steps=1)
    assert [path.name for path in (tmp_path / "set_aside").iterdir()] == ["batch-000002.json"]
    assert rows(tmp_path)[0]["set_aside_pruned_total"] == 1


def test_fields_that_nothing_is_computed_with_are_said_once(
    tiny_model_directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bodies = [make_body(number, images=["a picture"]) for number in range(2)]
    run(tiny_model_directory, tmp_path, bodies, steps=2)
    assert (
        caplog.text.count("images is not supported, and the groups are trained as if it were not there") == 1
    )

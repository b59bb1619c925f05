"""A machine that others use: what they can read, and what they can put in our way."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from atropos_client.errors import JournalNotWritten
from atropos_client.journal import Journal
from atropos_client.private_files import make_private_directory, make_run_directory, open_private
from tests.atropos_client.misbehaving_server import Answer, MisbehavingServer
from tests.forked import run_module
from tests.hostile.harness import script_api
from tests.security.parties import paths_below
from tests.trainer.batches import make_body
from tests.trainer.models import stream_of, tiny_model
from tests.trainer.runs import run
from trainer.errors import CheckpointError, MetricsError
from trainer.export.hf_model import capture_model
from trainer.publish import DiskTransport
from trainer.run.metrics import append_row, drop_later_rows
from trainer.samples.quarantine import QuarantineStore

NOBODY = 65534
PATIENCE = 120.0

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of other users")


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def open_to_others(directory: Path) -> dict[str, str]:
    """Everything at and below a directory that others have any right to, with its permissions."""
    paths = [directory, *directory.rglob("*")]
    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in paths if not path.is_symlink()}
    return {str(path.relative_to(directory)): oct(mode) for path, mode in modes.items() if mode & 0o077}


def train(
    server: MisbehavingServer, model: Path, output: Path, steps: int
) -> subprocess.CompletedProcess[str]:
    """The command itself, under a umask that allows everything to everybody."""
    return run_module(
        *("trainer.cli", "run"),
        *("--model.path", model, "--train.output_dir", output, "--train.steps", steps),
        *("--train.device", "cpu", "--train.mixed_precision", "no", "--loss.name", "policy_gradient"),
        *("--atropos.url", server.url, "--logging.trackers", "tensorboard"),
        umask=0,
    )


@pytest.mark.slow
def test_everything_that_a_run_writes_is_private_also_where_an_earlier_one_left_it_open(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    bad = json.dumps({"batch": [{"tokens": "x"}, *json.loads(make_body(1))["batch"]]}).encode()
    with MisbehavingServer() as server:
        script_api(server, [Answer(body=b"[7]"), Answer(body=bad)])
        done = train(server, tiny_model_directory, output, steps=1)
        assert done.returncode == 0, done.stderr[-3000:]
        written = paths_below(output)
        assert {"metrics.jsonl", "journal/journal.sqlite3", "set_aside/groups.jsonl", "final"} <= written
        assert {"set_aside/batch-000001.json", "checkpoints/step-000001/manifest.json"} <= written
        assert any("tfevents" in path for path in written)
        assert open_to_others(output) == {}

        for path in [output, *output.rglob("*")]:
            path.chmod(0o777)
        script_api(server, [Answer(body=bad)])
        done = train(server, tiny_model_directory, output, steps=2)
        assert done.returncode == 0, done.stderr[-3000:]
    assert stat.S_IMODE(output.stat().st_mode) == 0o775
    for name in ("journal", "checkpoints", "set_aside", "final"):
        assert stat.S_IMODE((output / name).stat().st_mode) == 0o700, name
    for name in ("metrics.jsonl", "set_aside/groups.jsonl", "checkpoints/step-000002/state.json"):
        assert not (output / name).stat().st_mode & 0o077, name


@pytest.mark.parametrize(
    ("mode", "directory", "file"), [(0o700, 0o700, 0o600), (0o750, 0o750, 0o640), (0o755, 0o755, 0o644)]
)
@pytest.mark.usefixtures("no_umask")
def test_published_weights_are_for_those_who_may_read_them(
    mode: int, directory: int, file: int, tmp_path: Path
) -> None:
    write = partial(capture_model(stream_of(tiny_model("llama"))), mode=mode)
    transport = DiskTransport(tmp_path / "published", lambda: write, keep=1, mode=mode)
    path = transport.capture(1)().path
    assert path is not None
    for each in (path, path.parent):
        assert stat.S_IMODE(each.stat().st_mode) == directory
    assert {stat.S_IMODE(each.stat().st_mode) for each in path.iterdir()} == {file}


@pytest.mark.usefixtures("no_umask")
def test_a_journal_is_private(tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    directory.mkdir(0o777)
    with Journal.open(directory) as journal:
        journal.append(b"{}", 1)
        assert "journal.sqlite3-wal" in paths_below(directory)
        assert open_to_others(directory) == {}


@pytest.mark.usefixtures("no_umask")
def test_a_directory_for_everybody_is_closed_only_where_it_is_our_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours, like_tmp, new = tmp_path / "ours", tmp_path / "tmp", tmp_path / "a/new"
    ours.mkdir(0o777)
    like_tmp.mkdir()
    like_tmp.chmod(0o1777)
    for each in (ours, like_tmp, new):
        make_run_directory(each)
    assert [stat.S_IMODE(each.stat().st_mode) for each in (ours, like_tmp, new, new.parent)] == [
        *(0o775, 0o1777, 0o700),
        0o777,
    ]
    assert f"Everybody could write to {ours}" in caplog.text
    assert f"Everybody can write to {like_tmp}" in caplog.text


def test_a_link_in_the_place_of_a_file_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text('{"step": 0}\n')
    run_directory = tmp_path / "run"
    (run_directory / "set_aside").mkdir(parents=True)
    store = QuarantineStore(run_directory / "set_aside")
    for name in ("set_aside/groups.jsonl", "set_aside/batch-000001.json", "metrics.jsonl"):
        (run_directory / name).symlink_to(victim)
    metrics = run_directory / "metrics.jsonl"
    drop_later_rows(metrics, step=9, batch=9)
    with pytest.raises(MetricsError, match="symbolic link"):
        append_row(metrics, {"step": 1})
    with pytest.raises(PermissionError, match="symbolic link"):
        store.keep_batch(b"{}", batch=1, reason="x")
    assert victim.read_text() == '{"step": 0}\n'


def test_a_pipe_or_a_directory_in_the_place_of_a_file_neither_hangs_nor_passes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    started = time.monotonic()
    for name in ("pipe", "directory"):
        with pytest.raises(OSError, match=name), open_private(tmp_path / name, "ab"):
            pass
    assert time.monotonic() - started < PATIENCE


@as_root
def test_a_link_that_another_user_has_put_in_the_place_of_a_directory_is_not_followed(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("set_aside", "checkpoints", "journal"):
        (tmp_path / name).symlink_to(theirs)
        os.chown(tmp_path / name, NOBODY, NOBODY, follow_symlinks=False)
    with pytest.raises(PermissionError, match="user 65534 has put there"):
        QuarantineStore(tmp_path / "set_aside").keep_batch(b"{}", batch=1, reason="x")
    with pytest.raises(PermissionError, match="user 65534 has put there"):
        make_private_directory(tmp_path / "checkpoints")
    with pytest.raises(JournalNotWritten, match="user 65534 has put there"):
        Journal.open(tmp_path / "journal")
    assert list(theirs.iterdir()) == []


@as_root
@pytest.mark.slow
def test_a_run_does_not_write_checkpoints_through_another_users_link(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    output = tmp_path / "run"
    output.mkdir()
    (output / "checkpoints").symlink_to(theirs)
    os.chown(output / "checkpoints", NOBODY, NOBODY, follow_symlinks=False)
    with pytest.raises(CheckpointError, match="user 65534 has put there"):
        run(tiny_model_directory, output, [make_body(1)], steps=1)
    assert list(theirs.iterdir()) == []


def test_a_link_of_our_own_to_a_larger_disk_is_followed(tmp_path: Path) -> None:
    (tmp_path / "large").mkdir(0o755)
    (tmp_path / "set_aside").symlink_to(tmp_path / "large")
    QuarantineStore(tmp_path / "set_aside").keep_batch(b"{}", batch=1, reason="x")
    assert (tmp_path / "large/batch-000001.json").read_bytes() == b"{}"
    assert stat.S_IMODE((tmp_path / "large").stat().st_mode) == 0o700


@pytest.mark.slow
def test_no_name_from_the_network_becomes_the_name_of_a_file(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    """Names that lead elsewhere, wherever text of others travels; what is written has only names of ours."""
    evil = f"../../../../..{tmp_path}/evil"
    good = json.loads(make_body(1))["batch"]
    extra = {
        "env_id": evil,
        "messages": [evil],
        "images": evil,
        "generation_params": {evil: evil},
        "group_overrides": {"path": evil},
        evil: evil,
    }
    bodies = [
        json.dumps({"batch": [*good, {**good[0], **extra}], "message": evil}).encode(),
        json.dumps({"batch": [{**group, **extra, "env_id": 1} for group in good]}).encode(),
    ]
    run(tiny_model_directory, tmp_path / "run", bodies, steps=2)
    assert [path for path in paths_below(tmp_path) if "evil" in path] == []
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("checkpoints", "final", "journal", "metrics.jsonl", "set_aside", "token_logprobs.jsonl")
    }
    assert {path.name for path in (tmp_path / "run/set_aside").iterdir()} == {"groups.jsonl"}

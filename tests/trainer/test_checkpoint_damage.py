"""Damage: found before anything is loaded, named, and gone round by way of the checkpoint before."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.forked import PROCESSES
from tests.trainer.batches import make_bodies
from tests.trainer.runs import assert_equal_tensors, run, weights
from trainer.checkpoints.format import verify_checkpoint
from trainer.checkpoints.retention import (
    find_newest_whole,
    list_checkpoints,
    prune_checkpoints,
    set_aside_damaged,
)
from trainer.cli import main
from trainer.errors import CheckpointError, DamagedCheckpoint


def test_the_command_lists_and_verifies(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(checkpoints.parent)]) == 0
    assert [line.split()[1:3] for line in capsys.readouterr().out.splitlines()] == [
        ["step", "2"],
        ["step", "4"],
    ]
    flip(checkpoints / "step-000004/model/model.safetensors", 0.5, 0)
    assert main(["checkpoint", "list", str(checkpoints)]) == 0  # it does not read the weights
    assert main(["checkpoint", "verify", str(checkpoints / "step-000002")]) == 0
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(checkpoints)]) == 1
    whole, damaged = capsys.readouterr().out.splitlines()
    assert whole.endswith("whole")
    assert damaged.endswith("model/model.safetensors is not what was written: its checksum differs")
    assert main(["checkpoint", "list", str(checkpoints / "step-000002/model")]) == 1


@pytest.fixture(scope="module")
def two_checkpoints(tiny_model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output directory of a run that stopped after step 4, with the checkpoints of steps 2 and 4."""
    output = tmp_path_factory.mktemp("run")
    run(tiny_model_directory, output, make_bodies(4), steps=10)
    return output


@pytest.fixture
def checkpoints(two_checkpoints: Path, tmp_path: Path) -> Path:
    shutil.copytree(two_checkpoints, tmp_path / "run")
    return tmp_path / "run/checkpoints"


def cut(path: Path, share: float) -> None:
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * share))


def flip(path: Path, share: float, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[min(int(len(content) * share), len(content) - 1)] ^= 1 << bit
    path.write_bytes(content)


Damage = Callable[[Path], None]


def damages() -> Iterator[tuple[str, Damage]]:
    yield "missing", lambda path: path.unlink()
    yield "empty", lambda path: cut(path, 0.0)
    for share in (0.1, 0.5, 0.999):
        yield f"cut off at {share}", lambda path, share=share: cut(path, share)
    yield "longer", lambda path: path.write_bytes(path.read_bytes() + b"\n ")
    for share in (0.0, 0.001, 0.03, 0.5, 0.77, 1.0):
        for bit in (0, 6):
            yield f"bit {bit} at {share}", lambda path, share=share, bit=bit: flip(path, share, bit)


FILES = [
    *("model/config.json", "model/generation_config.json", "model/model.safetensors"),
    *("model/chat_template.jinja", "model/tokenizer.json", "model/tokenizer_config.json"),
    *("optimizer.safetensors", "state.json", "manifest.json"),
]


def test_the_list_of_files_is_whole(checkpoints: Path) -> None:
    newest = checkpoints / "step-000004"
    found = {file.relative_to(newest).as_posix() for file in newest.rglob("*") if file.is_file()}
    assert found == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_whatever_happens_to_a_file_the_checkpoint_before_is_used(name: str, checkpoints: Path) -> None:
    whole = verify_checkpoint(checkpoints / "step-000004")
    content = (checkpoints / "step-000004" / name).read_bytes()
    for kind, damage in damages():
        damage(checkpoints / "step-000004" / name)
        if name == "manifest.json" and kind == "longer":  # space after JSON: it still says the same
            assert verify_checkpoint(checkpoints / "step-000004").manifest == whole.manifest
            (checkpoints / "step-000004" / name).write_bytes(content)
            continue
        found, damaged = find_newest_whole(checkpoints, verify_checkpoint)
        assert found is not None, kind
        assert found.state.step == 2, kind
        assert str(damaged[checkpoints / "step-000004"]).startswith(f"{name} "), kind
        (checkpoints / "step-000004" / name).write_bytes(content)
    found, damaged = find_newest_whole(checkpoints, verify_checkpoint)
    assert found is not None
    assert (found.state.step, damaged) == (4, {})


def test_a_run_goes_on_from_the_one_before_and_ends_as_if_nothing_had_happened(
    tiny_model_directory: Path, checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flip(checkpoints / "step-000004/optimizer.safetensors", 0.5, 3)
    run(tiny_model_directory, checkpoints.parent, make_bodies(4, first_seed=2), steps=6)
    assert "step-000004 is damaged: optimizer.safetensors " in caplog.text
    run(tiny_model_directory, tmp_path / "whole", make_bodies(6), steps=6)
    assert_equal_tensors(weights(checkpoints.parent / "final"), weights(tmp_path / "whole/final"))
    # The damaged one is neither used, nor deleted, nor counted as one of those that are kept.
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        *("step-000004", "step-000004.damaged", "step-000006")
    ]


def test_damaged_ones_do_not_count_as_kept_and_get_names_of_their_own(checkpoints: Path) -> None:
    for _ in range(2):
        shutil.copytree(checkpoints / "step-000002", checkpoints / "step-000009", dirs_exist_ok=True)
        cut(checkpoints / "step-000009/state.json", 0.5)
        whole, damaged = find_newest_whole(checkpoints, verify_checkpoint)
        assert whole is not None
        set_aside_damaged(damaged, instead=whole)
    prune_checkpoints(checkpoints, keep=1)
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        *("step-000004", "step-000009.damaged", "step-000009.damaged-2")
    ]


def test_when_all_are_damaged_each_is_named_and_none_is_touched(
    tiny_model_directory: Path, checkpoints: Path
) -> None:
    cut(checkpoints / "step-000002/state.json", 0.5)
    (checkpoints / "step-000004/model/config.json").unlink()
    for _ in range(2):  # a second start does not begin from nothing either
        with pytest.raises(CheckpointError) as caught:
            run(tiny_model_directory, checkpoints.parent, make_bodies(1), steps=5)
        assert "step-000002: state.json has" in str(caught.value)
        assert "step-000004: model/config.json cannot be read: No such file" in str(caught.value)
        assert len(list_checkpoints(checkpoints)) == 2


def test_a_whole_one_of_a_later_format_is_refused_and_not_passed_over(checkpoints: Path) -> None:
    path = checkpoints / "step-000004/manifest.json"
    content = json.loads(path.read_text()) | {"format": 99, "news": 1}
    del content["checksum"]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="format 99") as caught:
        find_newest_whole(checkpoints, verify_checkpoint)
    assert not isinstance(caught.value, DamagedCheckpoint)
    assert path.exists()


def resume_without_pickles(model: Path, output: Path) -> None:
    """Resume a run in this process, which has no more use for pickles."""

    def refuse_class(event: str, arguments: tuple[Any, ...]) -> None:
        # Raised by every unpickler for each class or function that it is about to look up.
        if event == "pickle.find_class":
            raise RuntimeError(f"something was unpickled: {arguments}")

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("something was unpickled")

    sys.addaudithook(refuse_class)
    torch.load = pickle.load = pickle.loads = refuse
    assert run(model, output, make_bodies(1), steps=5).step == 5


PICKLE_STARTS = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))


def test_loading_never_unpickles(tiny_model_directory: Path, checkpoints: Path) -> None:
    for file in (checkpoints / "step-000004").rglob("*"):
        if file.is_file():
            assert file.suffix in (".json", ".jinja", ".safetensors"), file
            assert not file.read_bytes().startswith((b"PK", *PICKLE_STARTS)), file
    process = PROCESSES.Process(
        target=resume_without_pickles, args=(tiny_model_directory, checkpoints.parent)
    )
    process.start()
    process.join(120)
    process.kill()
    assert process.exitcode == 0

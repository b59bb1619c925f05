"""`atropos-train journal` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from atropos_client.journal import Journal
from tests.trainer.batches import make_bodies
from trainer.checkpoints.manifest import write_manifest
from trainer.cli import main


@pytest.fixture
def output(tmp_path: Path) -> Path:
    with Journal.open(tmp_path / "run" / "journal") as journal:
        for body in make_bodies(3):
            journal.append(body, served_version=6)
        journal.append(b"not JSON")
        journal.settle(1, "trained", step=7)
        journal.settle(2, "set_aside", reason="no advantage differs from 0")
        journal.prune(1)
    return tmp_path / "run"


def test_list_prints_the_ledger(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["journal", "list", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["batch", "received", "version", "bytes", "kept", "outcome", "step", "reason"]
    assert "pruned" in lines[1]
    assert lines[1].rstrip().endswith("trained       7")
    assert "set_aside" in lines[2]
    assert lines[2].rstrip().endswith("no advantage differs from 0")
    assert lines[-1].startswith("1 trained, 1 set_aside, 2 received; ")


def test_show_prints_the_groups_of_a_batch(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["journal", "show", str(output / "journal"), "3"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("batch 3")
    assert "served version 6" in shown
    assert len([line for line in shown.splitlines() if line.split()[1:3] == ["0", "4"]]) == 3
    assert main(["journal", "show", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "the body was pruned" in shown
    assert "unreadable: " in shown


def test_show_tells_what_was_set_aside_and_prints_texts_with_masks(
    tiny_model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codec = AutoTokenizer.from_pretrained(tiny_model_directory)
    prompt, reply, end = codec.encode("2+2?"), codec.encode("Four"), codec.encode(".")
    good = {
        "tokens": [prompt + reply + end],
        "masks": [[-100] * len(prompt) + reply + [-100] * len(end)],
        "scores": [0.5],
    }
    with Journal.open(tmp_path / "journal") as journal:
        journal.append(json.dumps({"batch": [{**good, "masks": [[7]]}, good, good]}).encode(), 0)
        journal.settle(1, "trained", step=1)
    aside = {"batch": 1, "group_index": 2, "env_id": None, "reason": "no inference_logprobs", "group": good}
    (tmp_path / "set_aside").mkdir()
    (tmp_path / "set_aside/groups.jsonl").write_text(json.dumps(aside) + "\n{cut")
    assert main(["journal", "show", str(tmp_path), "1", "--text", str(tiny_model_directory)]) == 0
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    assert ["1", "None", "1", str(len(prompt + reply + end)), str(len(reply)), "0.5"] in lines
    assert ["2", "None", "1", str(len(prompt + reply + end)), "set", "aside", "0.5"] in lines
    assert "group 0 was set aside: tokens[0] has" in shown
    assert "group 2 was set aside: no inference_logprobs" in shown
    assert "2+2?⟦Four⟧." in shown


def test_the_hub_is_asked_for_no_tokenizer_but_that_of_the_run(
    output: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["journal", "show", str(output), "3", "--text", "nosuch-model"]) == 2
    said = capsys.readouterr().err
    assert "--text 'nosuch-model' cannot be used: there is no such directory" in said
    assert "asking the model hub" not in said
    checkpoint = output / "checkpoints/step-000001"
    checkpoint.mkdir(parents=True)
    model = {"path": "nosuch-model", "tokenizer_path": None}
    write_manifest(checkpoint, configuration={"model": model}, versions={})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["journal", "show", str(output), "3", "--text", "nosuch-model"]) == 2
    assert "nosuch-model is no directory here: asking the model hub for it" in capsys.readouterr().err


def test_export_writes_json_lines(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["journal", "export", str(output), "2", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["reply"] for line in lines] == [json.loads(body) for body in make_bodies(3)[1:]]
    assert main(["journal", "export", "--groups", str(output)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_verify_finds_damage(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["journal", "verify", str(output)]) == 0
    assert "4 batches in the ledger, 3 bodies read, 0 problems" in capsys.readouterr().out
    path = output / "journal" / "journal.sqlite3"
    with Journal.read_only(output / "journal") as journal:
        compressed = journal._connection.execute("SELECT zlib FROM bodies WHERE number = 3").fetchone()[0]
    content = path.read_bytes()
    assert content.count(compressed[100:200]) == 1
    path.write_bytes(content.replace(compressed[100:200], bytes(100)))
    assert main(["journal", "verify", str(output)]) == 1
    found = capsys.readouterr().out
    assert "the body of batch 3" in found
    assert "1 problem\n" in found
    path.write_bytes(b"SQLite format 3" + bytes(4096))
    for action in ("verify", "list"):
        assert main(["journal", action, str(output)]) == 1
        said = capsys.readouterr().err
        assert "cannot be opened at all. Put a whole copy of it back" in said
        assert "atropos-train journal verify" not in said


def test_skip_has_a_batch_set_aside_unread(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["journal", "skip", str(output)]) == 2
    assert main(["journal", "skip", str(output), "9"]) == 1
    assert main(["journal", "skip", str(output), "3"]) == 0
    assert "batch 3 will be set aside unread" in capsys.readouterr().out
    assert main(["journal", "skip", str(output.parent), "3"]) == 1
    assert not (output.parent / "journal.sqlite3").exists()
    with Journal.read_only(output / "journal") as journal:
        assert journal.entry(3).skip_reason is not None
        assert journal.verify().problems == ()

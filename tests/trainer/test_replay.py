"""Training from recordings: what is read, in which order, and that it is the same training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from atroposlib.cli.sft import grab_group_data
from transformers import AutoTokenizer

from atropos_client.journal import Journal, export_batches
from tests.trainer.batches import make_bodies, make_group
from tests.trainer.runs import assert_equal_tensors, rows, run, weights
from trainer import load_config
from trainer.cli._replay import adapt, replay
from trainer.errors import DataError
from trainer.replay import ReplaySource
from trainer.sources import EndOfBatches, IncomingBatch
from trainer.supervised import encode_supervised


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """A run's output with four batches in its journal; the run trained on 1, 2 and 4, 4 before 2."""
    with Journal.open(tmp_path / "live" / "journal") as journal:
        for version, body in enumerate(make_bodies(4)):
            journal.append(body, served_version=version)
        journal.settle(1, "trained", step=1)
        journal.settle(4, "trained", step=2)
        journal.settle(2, "trained", step=3)
        journal.settle(3, "set_aside", reason="no advantage differs from 0")
    return tmp_path / "live"


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def groups(count: int, **more: Any) -> list[dict[str, Any]]:
    generator = random.Random(count)
    return [make_group(generator, env_id=number, **more) for number in range(count)]


def all_of(source: ReplaySource) -> list[IncomingBatch]:
    source.start()
    batches = []
    try:
        while True:
            batch = source.get(1.0)
            assert batch is not None
            batches.append(batch)
    except EndOfBatches:
        source.stop()
        return batches


def environments(batches: list[IncomingBatch]) -> list[list[int | None]]:
    return [[group.env_id for group in batch.reply.groups] for batch in batches]


def test_a_journal_gives_its_batches_as_they_came(journal: Path) -> None:
    source = ReplaySource([journal], batch_size=12)
    assert source.count() == 4
    batches = all_of(source)
    assert [batch.body for batch in batches] == make_bodies(4)
    assert [batch.served_version for batch in batches] == [0, 1, 2, 3]
    assert source.counters() == {"replay_batches": 4}


def test_the_order_of_a_ledger_is_that_of_its_runs_steps(journal: Path) -> None:
    source = ReplaySource([journal / "journal"], batch_size=12, order="ledger")
    assert source.count() == 3
    bodies = make_bodies(4)
    assert [batch.body for batch in all_of(source)] == [bodies[0], bodies[3], bodies[1]]


def test_an_exported_journal_is_as_good_as_the_journal(journal: Path, tmp_path: Path) -> None:
    with Journal.read_only(journal / "journal") as opened:
        (tmp_path / "export.jsonl").write_text("\n".join(export_batches(opened, [1, 2, 3, 4])))
    batches = all_of(ReplaySource([tmp_path / "export.jsonl"], batch_size=12))
    assert [json.loads(batch.body) for batch in batches] == [json.loads(body) for body in make_bodies(4)]
    assert [batch.served_version for batch in batches] == [0, 1, 2, 3]


def test_what_a_checkpoint_counts_is_passed_over(journal: Path) -> None:
    batches = all_of(ReplaySource([journal], batch_size=12, skip=3))
    assert [batch.body for batch in batches] == make_bodies(4)[3:]


def test_a_pruned_journal_is_refused_by_name(journal: Path) -> None:
    with Journal.open(journal / "journal") as opened:
        opened.prune(1)
    source = ReplaySource([journal], batch_size=12)
    source.start()
    with pytest.raises(DataError, match=r"the body of batch 1 \(trained\) was pruned.*cannot be replayed"):
        source.get(1.0)


def test_groups_are_gathered_to_batches_of_so_many_sequences(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lines(tmp_path / "groups.jsonl", *groups(5))
    source = ReplaySource([path], batch_size=8)
    assert source.count() == 3
    batches = all_of(source)
    assert environments(batches) == [[0, 1], [2, 3], [4]]
    assert [batch.served_version for batch in batches] == [-1] * 3
    assert "The last batch has 4 of 8 sequences: trained on as it is." in caplog.text
    assert source.counters() == {"replay_batches": 3, "replay_partial_batches": 1}


def test_a_last_batch_that_is_not_full_can_be_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_lines(tmp_path / "groups.jsonl", *groups(5))
    source = ReplaySource([path], batch_size=8, train_partial=False)
    assert source.count() == 2
    assert environments(all_of(source)) == [[0, 1], [2, 3]]
    assert "4 of 8 sequences: left" in caplog.text


def test_a_batch_never_has_more_sequences_than_asked_unless_one_group_has(tmp_path: Path) -> None:
    sizes = [4, 3, 6, 20, 2]
    lines = [make_group(random.Random(size), size=size, env_id=size) for size in sizes]
    path = write_lines(tmp_path / "groups.jsonl", *lines)
    assert environments(all_of(ReplaySource([path], batch_size=8))) == [[4, 3], [6], [20], [2]]


def test_several_files_are_read_one_after_the_other(tmp_path: Path) -> None:
    one = write_lines(tmp_path / "one.jsonl", *groups(3))
    two = write_lines(tmp_path / "two.jsonl", *groups(1))
    assert environments(all_of(ReplaySource([one, two], batch_size=8))) == [[0, 1], [2, 0]]


def test_a_cut_off_last_line_and_blank_lines_are_passed_over_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lines(tmp_path / "groups.jsonl", *groups(2))
    with path.open("a") as file:
        file.write('\n{"tokens": [[1, 2')
    source = ReplaySource([path], batch_size=8)
    assert environments(all_of(source)) == [[0, 1]]
    assert source.counters()["replay_unreadable_lines"] == 1
    assert "Line 4 of" in caplog.text


def test_a_bad_group_is_left_to_the_loop_to_set_aside(tmp_path: Path) -> None:
    good, bad = groups(2)
    path = write_lines(tmp_path / "groups.jsonl", good, {**bad, "scores": [1.0]})
    (batch,) = all_of(ReplaySource([path], batch_size=8))
    assert ([g.env_id for g in batch.reply.groups], len(batch.reply.rejected)) == ([0], 1)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({"prefix": "a", "pos": "b", "neg": "c", "score": 1.0}, "pair of texts"),
        ({"question": "a", "answer": "b"}, "no group .* it has: question, answer"),
    ],
)
def test_lines_that_are_something_else_are_refused(
    tmp_path: Path, line: dict[str, Any], complaint: str
) -> None:
    source = ReplaySource([write_lines(tmp_path / "x.jsonl", line)], batch_size=8, encode=lambda line: {})
    source.start()
    with pytest.raises(DataError, match=rf"line 1 of .*{complaint}"):
        source.get(1.0)


def test_a_path_without_a_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no journal is in it"):
        ReplaySource([tmp_path], batch_size=8)
    with pytest.raises(DataError, match="does not exist"):
        ReplaySource([tmp_path / "nothing"], batch_size=8)


# Texts.


def test_what_atropos_sft_gen_writes_is_trained_on_with_advantage_one(tiny_model_directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_directory)
    question = tokenizer.encode("2+2=", add_special_tokens=False)
    answers = [tokenizer.encode(text, add_special_tokens=False) for text in ("four", "5")]
    group = {"tokens": [question + answer for answer in answers], "scores": [1.0, -1.0]}
    (line,) = grab_group_data(tokenizer, group, save_messages=False, save_top_n_per_group=4)
    encoded = encode_supervised(json.loads(json.dumps(line)), tokenizer)
    assert encoded["tokens"] == [question + answers[0]]
    assert encoded["masks"] == [[-100] * len(question) + answers[0]]
    assert encoded["advantages"] == [[0.0] * len(question) + [1.0] * len(answers[0])]
    assert encoded["scores"] == [1.0]


def test_the_last_message_of_a_chat_is_what_is_trained_on(tiny_model_directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_directory)
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "four"}]
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        encode_supervised({"messages": messages, "score": 1.0}, tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    encoded = encode_supervised({"messages": messages, "score": 1.0}, tokenizer)
    trained = [token for token in encoded["masks"][0] if token != -100]
    assert tokenizer.decode(trained) == "four\n"
    assert tokenizer.decode(encoded["tokens"][0]) == "<user>2+2?\n<assistant>four\n"


# The same training.


def replayed(model: Path, output: Path, paths: list[Path], *overrides: str, **options: Any) -> Any:
    words = [
        *("--model.path", str(model), "--train.output_dir", str(output), "--train.device", "cpu"),
        *("--train.mixed_precision", "no", "--optimizer.learning_rate", "1e-3"),
        *("--loss.name", "policy_gradient", "--checkpoint.every", "2", "--atropos.batch_size", "12"),
        *overrides,
    ]
    return replay(load_config(None, words, environment={}), paths, **options)


@pytest.mark.slow
def test_a_replay_ends_with_the_weights_of_the_run_that_it_repeats(
    tiny_model_directory: Path, journal: Path, tmp_path: Path
) -> None:
    run(tiny_model_directory, tmp_path / "first", make_bodies(4))
    summary = replayed(tiny_model_directory, tmp_path / "again", [journal])
    assert (summary.step, summary.stopped_early) == (4, None)
    assert_equal_tensors(weights(tmp_path / "again" / "final"), weights(tmp_path / "first" / "final"))
    assert [row["served_version"] for row in rows(tmp_path / "again")] == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_replay_goes_on_from_its_checkpoint(
    tiny_model_directory: Path, journal: Path, tmp_path: Path
) -> None:
    run(tiny_model_directory, tmp_path / "first", make_bodies(4))
    # As if it had been stopped after two of its four steps.
    run(tiny_model_directory, tmp_path / "again", make_bodies(2), steps=4)
    summary = replayed(tiny_model_directory, tmp_path / "again", [journal])
    assert summary.step == 4
    assert_equal_tensors(weights(tmp_path / "again" / "final"), weights(tmp_path / "first" / "final"))


@pytest.mark.slow
def test_texts_are_trained_on(tiny_model_directory: Path, tmp_path: Path) -> None:
    lines = [{"prefix": f"{n}+1=", "completion": str(n + 1), "score": 1.0} for n in range(8)]
    path = write_lines(tmp_path / "sft.jsonl", *lines)
    overrides = ("--loss.name", "weighted_sft", "--atropos.batch_size", "4")
    summary = replayed(tiny_model_directory, tmp_path / "out", [path], *overrides)
    assert summary.step == 2
    assert [row["sequences"] for row in rows(tmp_path / "out")] == [4, 4]


def test_a_replay_is_one_pass_and_publishes_nothing_unless_told_otherwise() -> None:
    words = ["--model.path", "m", "--publish.transport", "disk", "--publish.servers", "http://127.0.0.1:1"]
    config = load_config(None, words, environment={})
    quiet = adapt(config, steps=lambda: 7, publish=False)
    assert (quiet.train.steps, quiet.publish.transport) == (7, "none")
    told = load_config(None, [*words, "--train.steps", "3"], environment={})
    loud = adapt(told, steps=lambda: 7, publish=True)
    assert (loud.train.steps, loud.publish.transport) == (3, "disk")

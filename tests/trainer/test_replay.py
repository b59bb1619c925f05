"""Training from recordings: what is read, in which order, and that it is the same training."""

from __future__ import annotations

import gzip
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
from trainer.errors import ConfigurationError, DataError
from trainer.sources.incoming import EndOfBatches, IncomingBatch
from trainer.sources.replay import ReplaySource
from trainer.sources.sft_files import encode_supervised


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


def all_of(source: ReplaySource, *, skip: int = 0, position: str = "") -> list[IncomingBatch]:
    source.pass_over(skip, position=position)
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
    position = all_of(ReplaySource([journal], batch_size=12))[2].position
    batches = all_of(ReplaySource([journal], batch_size=12), skip=3, position=position)
    assert [batch.body for batch in batches] == make_bodies(4)[3:]


def test_what_cannot_be_read_does_not_count_among_what_is_passed_over(tmp_path: Path) -> None:
    lines = [{"reply": {"batch": 3}}, *({"reply": json.loads(body)} for body in make_bodies(3))]
    path = write_lines(tmp_path / "export.jsonl", *lines)
    everything = all_of(ReplaySource([path], batch_size=12))
    rest = ReplaySource([path], batch_size=12)
    last = all_of(rest, skip=2, position=everything[1].position)
    assert [batch.body for batch in last] == [everything[2].body]
    assert rest.counters() == {"replay_batches": 1}


def test_other_recordings_than_a_checkpoint_counts_are_refused(journal: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "groups.jsonl", *groups(6))
    other = write_lines(tmp_path / "other.jsonl", *groups(7))
    after_2 = all_of(ReplaySource([path], batch_size=8))[1].position
    after_2_of_journal = all_of(ReplaySource([journal], batch_size=8))[1].position
    for position, paths, options in [
        (after_2, [path], {"batch_size": 4}),
        (after_2, [path], {"batch_size": 16}),
        (after_2, [other, path], {"batch_size": 8}),
        (after_2_of_journal, [journal], {"batch_size": 8, "order": "ledger"}),
    ]:
        source = ReplaySource(paths, **options)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match=r"--replay\.order or atropos\.batch_size are others"):
            source.pass_over(2, position=position)
    more = all_of(ReplaySource([path, other], batch_size=8), skip=2, position=after_2)
    assert environments(more)[0] == [4, 5]


def test_a_pruned_journal_is_refused_by_name(journal: Path) -> None:
    with Journal.open(journal / "journal") as opened:
        opened.prune(1)
    source = ReplaySource([journal], batch_size=12)
    with pytest.raises(ConfigurationError, match=r"the body of batch 1 \(trained\) was pruned.*prune false"):
        source.require_batches()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is empty"),
        (gzip.compress(b'{"tokens": [[1]]}', mtime=0), "compressed with gzip"),
        ('{"tokens": [[1]]}'.encode("utf-16"), "text in UTF-16"),
        (b"\n", "it is empty"),
        (b"question,answer\n1,2\n", "its first line is no JSON object"),
        (b'{\n"tokens": [[1]]}', "its first line is no JSON object"),
        (b"[1]\n", "its first line is no JSON object"),
    ],
)
def test_a_file_that_is_no_json_lines_is_refused_at_once(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "groups.jsonl").write_bytes(content)
    with pytest.raises(ConfigurationError, match=rf"nothing can be replayed from .*groups\.jsonl: .*{why}"):
        ReplaySource([tmp_path / "groups.jsonl"], batch_size=8)


@pytest.mark.parametrize("content", ['{"reply": null}\n', '{"reply": null}\nno JSON\n'])
def test_recordings_without_a_batch_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "groups.jsonl").write_text(content)
    source = ReplaySource([tmp_path / "groups.jsonl"], batch_size=8)
    with pytest.raises(DataError, match=r"there is no batch to replay in .*groups\.jsonl"):
        source.count()
    good = write_lines(tmp_path / "good.jsonl", *groups(1))
    both = ReplaySource([good, tmp_path / "groups.jsonl"], batch_size=8)
    with pytest.raises(ConfigurationError, match=r"there is no batch to replay in .*groups\.jsonl"):
        both.require_batches()


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


def test_a_replay_that_cannot_be_leaves_nothing_behind(
    tiny_model_directory: Path, journal: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    wrong = write_lines(tmp_path / "wrong.jsonl", {"question": "a", "answer": "b"})
    good = write_lines(tmp_path / "groups.jsonl", *groups(3))
    for paths in ([wrong], [good, wrong]):
        with pytest.raises(ConfigurationError, match=r"line 1 of .*wrong\.jsonl is no group"):
            replayed(tiny_model_directory, output, paths)
    assert not output.exists()
    before = set(journal.rglob("*"))
    with pytest.raises(ConfigurationError, match="is that of a run on an Atropos API"):
        replayed(tiny_model_directory, journal, [journal])
    left = {path.name for path in journal.rglob("*")} - {path.name for path in before}
    assert left <= {"lock", "journal.sqlite3-wal", "journal.sqlite3-shm", "health.json"}


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


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ raise_exception('only tools') }}", "does not take the recorded messages: only tools"),
        ("{{ date.today() }}", "does not take the recorded messages: 'date' is undefined"),
        ("", "writes nothing for the last message"),
    ],
)
def test_a_chat_template_that_does_not_take_a_line_is_named_with_the_line(
    template: str, complaint: str, tiny_model_directory: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_directory)
    tokenizer.chat_template = template
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "four"}]
    path = write_lines(tmp_path / "sft.jsonl", {"prefix": "a", "completion": "b"}, {"messages": messages})
    source = ReplaySource([path], batch_size=8, encode=lambda line: encode_supervised(line, tokenizer))
    source.start()
    with pytest.raises(DataError, match=rf"line 2 of .*sft\.jsonl: the chat template {complaint}"):
        source.get(1.0)


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
    tiny_model_directory: Path, journal: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tiny_model_directory, tmp_path / "first", make_bodies(4))
    # As if it had been stopped after two of its four steps.
    replayed(tiny_model_directory, tmp_path / "again", [journal], "--train.steps", "2")
    caplog.set_level("INFO")
    summary = replayed(tiny_model_directory, tmp_path / "again", [journal])
    assert summary.step == 4
    assert caplog.text.count("Going on from checkpoint") == 1
    with pytest.raises(ConfigurationError, match="the first 4 batches of"):
        replayed(tiny_model_directory, tmp_path / "again", [journal], order="ledger")
    assert_equal_tensors(weights(tmp_path / "again" / "final"), weights(tmp_path / "first" / "final"))


@pytest.mark.slow
def test_texts_are_trained_on(tiny_model_directory: Path, tmp_path: Path) -> None:
    lines = [{"prefix": f"{n}+1=", "completion": str(n + 1), "score": 1.0} for n in range(8)]
    path = write_lines(tmp_path / "sft.jsonl", *lines)
    overrides = ("--loss.name", "weighted_sft", "--atropos.batch_size", "4")
    summary = replayed(tiny_model_directory, tmp_path / "out", [path], *overrides)
    assert summary.step == 2
    assert [row["sequences"] for row in rows(tmp_path / "out")] == [4, 4]
    with pytest.raises(ConfigurationError, match=r"--replay\.order or atropos\.batch_size are others"):
        replayed(tiny_model_directory, tmp_path / "out", [path], *overrides, "--atropos.batch_size", "8")


def test_a_replay_is_one_pass_and_publishes_nothing_unless_told_otherwise() -> None:
    words = ["--model.path", "m", "--publish.transport", "disk", "--publish.servers", "http://127.0.0.1:1"]
    config = load_config(None, words, environment={})
    quiet = adapt(config, steps=lambda: 7, publish=False)
    assert (quiet.train.steps, quiet.publish.transport) == (7, "none")
    told = load_config(None, [*words, "--train.steps", "3"], environment={})
    loud = adapt(told, steps=lambda: 7, publish=True)
    assert (loud.train.steps, loud.publish.transport) == (3, "disk")


def test_texts_with_a_score_of_0_or_less_are_passed_over_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in the samples.jsonl of an evaluation, right and wrong answers alike."""
    lines = [
        {"messages": [{"role": "assistant", "content": "a"}], "score": score} for score in (0.0, 1.0, -1.0, 0)
    ]
    path = write_lines(tmp_path / "samples.jsonl", *lines)
    encoded: list[Any] = []

    def encode(line: dict[str, Any]) -> dict[str, Any]:
        encoded.append(line)
        return {"tokens": [[1, 2]], "masks": [[-100, 2]], "scores": [line["score"]], "env_id": 7}

    source = ReplaySource([path], batch_size=4, encode=encode)
    assert source.count() == 1
    assert environments(all_of(source)) == [[7]]
    assert encoded == [lines[1]]
    assert source.counters()["replay_texts_without_score"] == 3
    assert "Line 1 of" in caplog.text
    assert "score of 0 or less are passed over" in caplog.text

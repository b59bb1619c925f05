"""What a user can get wrong: every command says in one line what it found and where, and no traceback."""

from __future__ import annotations

import http.server
import json
import os
import re
import shlex
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from atropos_client import JournalError
from atropos_client.journal import Journal
from local_stack.models import make_tiny_model
from tests.trainer.batches import make_bodies
from trainer.cli import main

RUN = "run --model.path {model} --train.output_dir {out}"
REPLAY = "replay --model.path {model} --train.device cpu --loss.name weighted_sft --replay.from {texts}"

CASES = [
    # Words.
    ("", 2, "required: COMMAND"),
    ("trian", 2, "invalid choice: 'trian'"),
    ("run x", 2, "unexpected argument 'x'"),
    ("run --train.steps", 2, "--train.steps needs a value"),
    ("run --model.path m --", 2, "unexpected argument '--'"),
    ("journal", 2, "required: action, DIR"),
    ("journal frob {empty}", 2, "invalid choice: 'frob'"),
    ("journal list {empty} x", 2, "invalid int value: 'x'"),
    ("journal list {empty} --train.steps 3", 2, "unknown arguments: --train.steps"),
    ("checkpoint verify", 2, "required: directory"),
    ("checkpoint list {empty} more", 2, "unknown arguments: more"),
    ("replay --model.path m", 2, "required: --replay.from"),
    ("replay --model.path m --replay.from {texts} --replay.order random", 2, "invalid choice: 'random'"),
    ("local --steps 0", 2, "must be 1 or more"),
    ("local --steps many", 2, "argument --steps"),
    ("local --engine none", 2, "invalid choice: 'none'"),
    *((command + " --train.step 3", 2, "did you mean train.steps?")
      for command in ("local", RUN, "check" + RUN[3:])),
    # The configuration file.
    *((f"run --config {{{name}}}", 2, "cannot read the configuration file {" + name + "}: " + why)
      for name, why in [("empty", "Is a directory"), ("missing", "No such"), ("dangling", "No such"),
                        ("loop", "Too many levels"), ("below", "Not a dir"), ("long", "File name too")]),
    ("run --config {texts}", 2, "is not valid YAML"),
    ("run --config {blank}", 2, "model.path: required"),
    ("run --config {weights}", 2, "is not valid YAML: its byte"),
    ("run --config /dev/zero", 2, "/dev/zero has more than"),
    ("run --config ''", 2, "--config: it is empty"),
    ("run --config=~nobody-has-it/x", 2, "nobody has the home directory ~nobody-has-it"),
    ("local --config {missing}", 2, "cannot read the configuration file {missing}: No such file"),
    # The output directory.
    *((command + " --train.output_dir {" + name + "}", 2, why)
      for command in ("run --model.path {model}", REPLAY)
      for name, why in [("texts", "{texts} is in the way: it is no directory"),
                        ("dangling", "a symbolic link to {missing}, which does not exist"),
                        ("loop", "a symbolic link that leads in a circle"),
                        ("below", "{texts} is in the way: it is no directory"),
                        ("long", "File name too long; choose another place"),
                        ("device", "/dev/null is in the way: it is no directory")]),
    ("run --model.path {model} --train.output_dir /proc/none", 1, "(train.output_dir /proc/none; choose"),
    ("check --model.path {model} --train.output_dir {below} --atropos.url http://a", 1, "{below}: Not"),
    ("local --run-dir {below}", 1, "{below}: Not a directory"),
    # The model.
    *((f"run --model.path {{{name}}} --train.output_dir {{out}}", 2, "model.path '{" + name + "}' ")
      for name in ("empty", "missing", "texts", "dangling", "loop", "below", "blank")),
    *((command, 2, "{texts}' cannot be used: it is a file") for command in (
        RUN + " --model.tokenizer_path {texts}", "journal show {recorded} --text {texts}")),
    ("run --model.path '' --train.output_dir {out}", 2, "model.path: it is empty"),
    (RUN + " --model.attention nonsense", 2, "nonsense"),
    (RUN + " --data.max_sequence_length 1000000", 2, "beyond the model's context"),
    # Recordings, journals, checkpoints.
    *((f"replay --model.path {{model}} --train.output_dir {{out}} --replay.from {{{name}}}", 2,
       "nothing can be replayed from {" + name + "}: " + why)
      for name, why in [("missing", "it does not exist"), ("empty", "no journal is in it"), ("loop", ""),
                        ("dangling", "it is a symbolic link to {missing}, which does not exist"),
                        ("below", ""), ("device", "")]),
    (REPLAY + " --train.output_dir {out} --model.tokenizer_path {missing}", 2, "{missing}"),
    (REPLAY + " --train.output_dir {out} --replay.form x", 2, "there is no argument --replay.form; those of"),
    ("replay --model.path {model} --train.output_dir {out} --replay.from {flat}", 1, "Nothing was trained"),
    *((f"{command} {{{name}}}", 1, f"in {{{name}}}: {why}")
      for command in ("journal list", "checkpoint list")
      for name, why in [("missing", "it does not exist"), ("dangling", "it is a symbolic link to")]),
    *((f"journal {action} {{{name}}}", 1, "there is no journal in {" + name + "}")
      for action in ("list", "show", "export", "verify")
      for name in ("missing", "empty", "texts", "dangling", "loop", "below", "device")),
    ("journal list {long}", 1, "File name too long"),
    ("journal show {recorded} 77", 1, "77"),
    ("journal show {recorded} -1", 1, "-1"),
    ("journal export {recorded} 77", 1, "77"),
    *((f"checkpoint {action} {{{name}}}", 1, "there is no checkpoint in {" + name + "}")
      for action in ("list", "verify")
      for name in ("missing", "empty", "texts", "dangling", "loop", "below", "device")),
    # Other parties.
    (RUN + " --health.port {port}", 2, "health.port: cannot listen on 127.0.0.1:{port}"),
    (RUN + " --health.port 0 --health.host 300.1.1.1", 2, "health.port: cannot listen on 300.1.1.1"),
    (RUN + " --atropos.url {html}", 1, "not JSON: is this the Atropos API?"),
    (RUN + " --atropos.url http://no.host.invalid --atropos.ready_timeout 0.1", 1, "invalid was not ready"),
    (RUN + " --publish.transport disk --publish.servers {html} --publish.ready_timeout 0.1", 1, "ModelList"),
    ("check" + RUN[3:] + " --atropos.url {html} --publish.transport disk --publish.servers {html}", 1,
     "its replies are not those of an inference server"),
    (REPLAY + " --train.output_dir {out} --logging.trackers tensorboard --logging.project /proc/none", 2,
     "logging.trackers (tensorboard) cannot be opened"),
]  # fmt: skip


class Html(http.server.BaseHTTPRequestHandler):
    """A server that is something else."""

    def do_GET(self) -> None:
        body = b"<html>hello</html>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        pass


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    root = tmp_path_factory.mktemp("bad")
    paths = {name: root / name for name in ("empty", "missing", "dangling", "loop", "blank", "recorded")}
    paths |= {"texts": root / "texts.jsonl", "device": Path("/dev/null"), "long": root / ("x" * 300)}
    paths["below"] = paths["texts"] / "below"
    paths["model"] = make_tiny_model(root / "model")
    paths["weights"] = paths["model"] / "model.safetensors"
    paths["empty"].mkdir()
    paths["blank"].touch()
    paths["dangling"].symlink_to(paths["missing"])
    paths["loop"].symlink_to(paths["loop"])
    paths["texts"].write_text('{"prefix": "a", "completion": "b", "score": 1}\n' * 2)
    with Journal.open(paths["recorded"] / "journal") as journal:
        journal.append(make_bodies(1)[0])
    flat = json.loads(make_bodies(1)[0])["batch"][0]
    paths["flat"] = root / "flat.jsonl"
    paths["flat"].write_text(json.dumps({**flat, "scores": [0.0] * len(flat["scores"]), "advantages": None}))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Html) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = str(server.server_port)
        names = {name: str(path) for name, path in paths.items()}
        yield {**names, "port": port, "html": f"http://127.0.0.1:{port}"}
        server.shutdown()


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # `local` makes runs/ where it is


@pytest.mark.parametrize(("words", "status", "message"), CASES)
def test_what_is_wrong_is_said_in_one_line(
    words: str,
    status: int,
    message: str,
    places: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {**places, "out": str(tmp_path / "out")}
    try:
        ended = main([word.format_map(names) for word in shlex.split(words)])
    except SystemExit as error:
        ended = int(str(error.code))
    said = "".join(capsys.readouterr())
    assert ended == status, said
    assert message.format_map(names) in said
    if "did you mean" in message:
        assert not (tmp_path / "out").exists(), "before anything runs"
    assert "Traceback" not in said
    assert "unexpected" not in said or "unexpected argument" in said
    if not words.startswith("check") and "{flat}" not in words:  # whose last line is no error's
        assert len(re.findall("^atropos-train", said, re.MULTILINE)) == 1, said


class Broken:
    """What a bug looks like from outside."""

    name = "broken"
    help = "fails"

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def add_arguments(self, parser: object) -> None:
        pass

    def run(self, args: object) -> int:
        raise self._error


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (
            KeyError("x"),
            1,
            "failed: unexpected KeyError: 'x'. This is a bug; please report it with the traceback",
        ),
        (MemoryError(), 1, "out of memory: no message. Lower data.tokens_per_micro_batch"),
        (
            OSError(28, "No space left on device", "/x/y"),
            1,
            "failed: /x/y: No space left on device; make room",
        ),
        (JournalError("there is no journal in /x."), 1, "failed: there is no journal in /x\n"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            ModuleNotFoundError("x", name="not_there"),
            2,
            "needs the package not_there, which is not installed",
        ),
    ],
)
def test_whatever_ends_a_command_is_one_line(
    error: BaseException,
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from trainer.cli import _main

    monkeypatch.setattr(_main, "_commands", lambda: {"broken": Broken(error)})
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["broken"]) == status
    said = capsys.readouterr().err
    assert said.startswith(f"atropos-train broken: {message}")
    assert said.count("\n") == 1
    files = list(tmp_path.glob("*traceback.txt"))
    assert len(files) == ("bug" in message)
    for file in files:
        assert str(file) in said
        assert "KeyError" in file.read_text()
        assert file.stat().st_mode & 0o077 == 0


# Processes: output that nobody reads, or that cannot be written as it is; packages that are missing.


def shell(command: str, **environment: str) -> tuple[int, str]:
    import subprocess

    cli = f"{shlex.quote(sys.executable)} -W error -m trainer.cli"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command.replace("atropos-train", cli)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.slow
def test_output_that_nobody_reads_or_that_cannot_be_written_ends_nothing_with_a_traceback(
    places: dict[str, str],
) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TERM": "dumb", "COLUMNS": "40"}
    recorded = shlex.quote(places["recorded"])
    many = f"journal export {recorded}" + " 1" * 400
    results = [
        shell("atropos-train run --help | head -1"),
        shell(f"atropos-train {many} | head -c 10"),
        shell(f"atropos-train journal list {recorded} >&-"),
        shell(f"atropos-train journal list {recorded}", **plain),
        shell("atropos-train run --help > /dev/null", **plain),
        *(
            shell(f"atropos-train journal list {recorded} > /dev/full", PYTHONUNBUFFERED=unbuffered)
            for unbuffered in ("1", "")
        ),
    ]
    assert results[0][0] in (0, 141)  # the pipe may hold all of it
    assert [status for status, _ in results[1:]] == [141, 0, 0, 0, 1, 1], results
    assert all("Traceback" not in said and "Exception ignored" not in said for _, said in results), results
    assert all("No space left on device" in said for _, said in results[-2:])

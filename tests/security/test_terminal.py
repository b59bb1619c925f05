"""Text of others in logs, tables and messages: it is shown, it does not act."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atropos_client.journal import Journal
from atropos_client.log_lines import PrintableFormatter
from schemas import printable
from tests.atropos_client.misbehaving_server import Answer, MisbehavingServer
from tests.forked import run_module
from tests.hostile.harness import script_api
from tests.security.parties import check, publish_to
from tests.trainer.batches import make_body
from trainer.cli import main
from trainer.cli._logging import configure_logging
from trainer.cli._progress import show_step

PATIENCE = 120.0
CLEAR_SCREEN = "\x1b[2J\x1b]0;owned\x07"
FORGED = "\n[12:00:00] INFO     Wrote checkpoint /forged"
EVIL = f"{CLEAR_SCREEN}{FORGED}\r\x9b31m\u202e[red]x[/blue][link=file:///etc/passwd]"


@pytest.fixture
def server() -> Iterator[MisbehavingServer]:
    with MisbehavingServer() as running:
        yield running


def assert_harmless(shown: str) -> None:
    assert not set(shown) & {"\x1b", "\x07", "\x9b", "\r", "\u202e"}, shown
    assert not any(line.startswith(FORGED[1:10]) and "/forged" in line for line in shown.splitlines()), shown


@given(text=st.text())
def test_what_is_printable_has_no_character_that_acts(text: str) -> None:
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    assert_harmless(shown)
    assert printable(shown) == shown
    if text.isprintable():
        assert shown == text or set(text) & set("\u200e\u200f")
    assert printable(text.replace("\x1b", ""), lines=True).count("\n") == text.count("\n")


@pytest.mark.slow
def test_what_an_environment_sends_does_not_act_in_the_log_of_a_run(
    server: MisbehavingServer, tiny_model_directory: Path, tmp_path: Path
) -> None:
    """Reasons quote what was found, and environments can put anything there."""
    good = json.loads(make_body(1))["batch"]
    batch = [
        *good,
        {**good[0], "overrides": [{"temperature": EVIL}] * 4},
        {**good[0], "overrides": [{"set_advantage_to_zero": EVIL}] * 4},
        {**good[0], "scores": [EVIL] * 4},
        {**good[0], "env_id": EVIL},
        EVIL,
    ]
    script_api(
        server,
        [
            Answer(status=500, body=EVIL.encode()),
            Answer(body=b"{}", content_type="text/\x1b[2J"),
            Answer(body=EVIL.encode()),
            Answer(body=json.dumps({"batch": batch, "message": EVIL, "status": EVIL}).encode()),
        ],
    )
    done = run_module(
        *("trainer.cli", "run", "--model.path", tiny_model_directory),
        *("--train.output_dir", tmp_path / "run", "--train.steps", "1", "--train.device", "cpu"),
        *("--train.mixed_precision", "no", "--loss.name", "policy_gradient", "--atropos.url", server.url),
        environment=os.environ | {"FORCE_COLOR": ""},
    )
    shown = done.stderr
    assert done.returncode == 0, shown
    assert shown.count("Set aside group") == 5
    assert "[red]x[/blue]" in shown, "shown as it stands, not taken for markup"
    assert_harmless(shown)

    for action in ("list", "show"):
        main(["journal", action, str(tmp_path / "run")])


def test_the_journal_shows_reasons_as_they_stand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Journal.open(tmp_path) as journal:
        journal.append(json.dumps({"batch": [{"tokens": EVIL}, EVIL]}).encode(), 1)
        journal.append(EVIL.encode(), 1)
        journal.settle(1, "set_aside", reason=EVIL)
    for action in ("list", "show"):
        assert main(["journal", action, str(tmp_path)]) == 0
        shown = capsys.readouterr().out
        assert_harmless(shown)
        assert "[red]x[/blue]" in shown


@pytest.mark.parametrize("party", [publish_to, check])
def test_what_an_inference_server_says_does_not_act_in_a_message(
    party: object, server: MisbehavingServer
) -> None:
    for path in ("/status", "/health", "/v1/models"):
        server.script(path, Answer(status=500, body=EVIL.encode()))
    assert callable(party)
    assert_harmless(printable(party(server.url), lines=True))
    if party is publish_to:
        assert_harmless(party(server.url))


def test_a_name_that_a_server_gives_to_its_model_does_not_act_on_the_terminal(
    server: MisbehavingServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script("/health", Answer())
    server.script("/v1/models", Answer(body=json.dumps({"data": [{"id": EVIL}]}).encode()))
    words = ("--model.path", str(tmp_path), "--atropos.url", server.url, "--train.output_dir", str(tmp_path))
    words += ("--train.device", "cpu", "--train.mixed_precision", "no")  # which are chosen once a process
    main(["check", *words, "--publish.transport", "disk", "--publish.servers", server.url])
    shown = capsys.readouterr().out
    assert "healthy, serves" in shown
    assert "[red]x[/blue]" in shown
    assert_harmless(shown)


def test_a_traceback_does_not_act_either() -> None:
    try:
        float(f"x{EVIL}")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "It %s", ("failed",), sys.exc_info())
    shown = PrintableFormatter("%(message)s").format(record)
    assert "Traceback" in shown
    assert not set(shown) & {"\x1b", "\x07", "\x9b", "\r", "\u202e"}


def test_the_handler_of_every_command_uses_it_and_no_markup() -> None:
    configure_logging("INFO")
    assert [type(handler.formatter) for handler in logging.getLogger().handlers] == [PrintableFormatter]


def test_log_lines_that_go_to_a_file_are_whole_and_carry_their_day(capfd: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO")
    logging.getLogger("a").info("said %s", 60 * "long ")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO said (long ){60}\n", capfd.readouterr().err)


def test_a_line_of_progress_is_no_markup(capfd: pytest.CaptureFixture[str]) -> None:
    show_step({"kind": "skipped", "step": 1, "batch": 1, "reason": EVIL})
    shown = capfd.readouterr().err
    assert_harmless(shown)

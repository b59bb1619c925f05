"""Logs, dumps and run directories that somebody else gets to see: no secret is in them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from atropos_client import AtroposClient
from atropos_client.fetcher import Fetcher, FetcherSettings
from atropos_client.journal import Journal
from schemas import Registration
from tests.atropos_client.misbehaving_server import Answer, MisbehavingServer, eventually
from tests.forked import run_module
from tests.hostile.harness import script_api
from tests.security.parties import SECRET
from tests.trainer.batches import make_body
from trainer.config import PublishSettings, load_config
from trainer.errors import ConfigurationError

PATIENCE = 120.0
PASSWORD_URL = f"http://user:{SECRET}@127.0.0.1:1"


@pytest.fixture
def server() -> Iterator[MisbehavingServer]:
    with MisbehavingServer() as running:
        yield running


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_module("trainer.cli", *words, environment=os.environ | environment)


def files_with(secret: str, directory: Path) -> list[str]:
    half = secret[: len(secret) // 2 + 2].encode()
    return [str(path) for path in directory.rglob("*") if path.is_file() and half in path.read_bytes()]


@pytest.mark.slow
def test_a_run_against_servers_that_repeat_its_secrets_leaves_none_in_its_files_and_its_log(
    server: MisbehavingServer, tiny_model_directory: Path, tmp_path: Path
) -> None:
    """Checkpoints, journal, metrics, trackers, set-aside files, log lines and the error that ends the run."""
    secrets = {
        "ATROPOS_TRAINER_ATROPOS__TOKEN": f"{SECRET}-token",
        "ATROPOS_TRAINER_ATROPOS__HEADERS": f'{{"X-Key": "{SECRET}-header"}}',
        "ATROPOS_TRAINER_PUBLISH__TOKEN": f"{SECRET}-publish",
        "ATROPOS_TRAINER_PUBLISH__HEADERS": f'{{"X-Other": "{SECRET}-other"}}',
    }
    # Each repeats what it was sent.
    fail, unhealthy = (
        Answer(status=500, body=f"{SECRET}-{token} Bearer {SECRET}-{token} {SECRET}-{header}".encode())
        for token, header in (("token", "header"), ("publish", "other"))
    )
    moved = Answer(status=307, headers={"Location": f"http://user:{SECRET}-token@host/?t={SECRET}-token"})
    script_api(server, [fail, Answer(body=make_body(1)), moved, Answer(status=401, body=fail.body)])
    server.script("/health", unhealthy)
    run = (
        *("--model.path", str(tiny_model_directory), "--train.output_dir", str(tmp_path / "run")),
        *("--train.steps", "2", "--train.device", "cpu", "--train.mixed_precision", "no"),
        *("--atropos.url", server.url, "--atropos.batch_timeout", "4", "--logging.level", "DEBUG"),
        *("--logging.trackers", "tensorboard", "--publish.servers", server.url),
    )
    trained = command("run", *run, **secrets)
    unpublished = command(
        "run", *run, "--publish.transport", "disk", "--publish.ready_timeout", "2", **secrets
    )
    checked = command("check", *run, "--publish.transport", "disk", **secrets)
    said = [done.stdout + done.stderr for done in (trained, unpublished, checked)]
    assert [done.returncode for done in (trained, unpublished, checked)] == [1, 1, 1], said
    assert "possibly lost" in said[0]
    assert "redirected with status 307" in said[0]
    assert all("***" in each for each in said[:2]), said[:2]  # the servers did repeat them
    assert all(SECRET not in each for each in said)
    assert list((tmp_path / "run/checkpoints").glob("step-000001"))
    assert (tmp_path / "run/journal/journal.sqlite3").is_file()
    assert files_with(SECRET, tmp_path) == []


@pytest.mark.parametrize("setting", ["atropos.url", "publish.servers"])
@pytest.mark.parametrize("way", ["command line", "environment", "file"])
def test_a_url_with_a_password_is_refused_before_it_gets_anywhere_and_not_repeated(
    setting: str, way: str, tmp_path: Path
) -> None:
    section, _, key = setting.partition(".")
    file = tmp_path / "config.yaml"
    file.write_text(f"{section}:\n  {key}: {PASSWORD_URL}\n" if way == "file" else "")
    words = ["--model.path", "m", *((f"--{setting}", PASSWORD_URL) if way == "command line" else ())]
    name = f"ATROPOS_TRAINER_{section}__{key}".upper()
    environment = {name: PASSWORD_URL} if way == "environment" else {}
    with pytest.raises(ConfigurationError, match="must not hold a user or a password") as caught:
        load_config(file, words, environment=environment)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "atropos: {token: [" + SECRET,
        "atropos:\n  token: a\n  token: " + SECRET + ": b: c",
        f"atropos: {{token: [{SECRET}]}}",
        f"atropos: {{headers: {{X-Key: [{SECRET}]}}}}",
        f"atropos: {{headers: {SECRET}}}",
        f'atropos: {{token: "{SECRET}\\r\\nX-Evil: 1"}}',
        f'publish: {{headers: {{X: "{SECRET}\\n"}}}}',
        f"atropos: {{url: 'ftp://user:{SECRET}@host'}}",
        f"atropos: {{url: 'http://host/?key={SECRET}'}}",
    ],
)
def test_a_configuration_that_is_wrong_where_a_secret_stands_is_refused_without_it(
    text: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"model: {{path: m}}\n{text}\n")
    done = command("run", "--config", str(file))
    assert done.returncode == 2, done.stderr
    assert SECRET not in done.stderr + done.stdout


def test_a_header_given_wrongly_on_the_command_line_is_refused_without_its_secret() -> None:
    with pytest.raises(ConfigurationError, match="not a valid list or mapping") as caught:
        load_config(None, ["--atropos.headers", f"{{X-Key: {SECRET}"], environment={})
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


def test_what_objects_say_of_themselves_has_no_secret() -> None:
    words = ("--model.path", "m", "--atropos.token", SECRET, "--publish.token", SECRET)
    config = load_config(None, [*words, "--atropos.headers", f"{{X: {SECRET}}}"], environment={})
    settings = FetcherSettings(
        url="http://127.0.0.1:1",
        registration=Registration(batch_size=1, max_token_len=2, num_steps=1),
        token=config.atropos.token,
        headers=config.atropos.headers,
    )
    client = AtroposClient(settings)
    shown = [repr(config), str(config), config.model_dump_json(), repr(client), repr(settings)]
    shown += [str(config.model_dump()), repr(PublishSettings(token=config.publish.token))]
    assert [text for text in shown if SECRET in text] == []
    client.close()


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="only Linux shows processes as files")
def test_the_fetching_process_is_given_its_secrets_where_other_users_cannot_see_them(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    """Any user of a machine can read the command line of any process."""
    script_api(server, [])
    settings = FetcherSettings(
        url=server.url,
        registration=Registration(batch_size=4, max_token_len=64, num_steps=1),
        token=SECRET,
        headers={"X-Key": SECRET},
    )
    with Journal.open(tmp_path) as journal, Fetcher(journal, settings, after=0) as fetcher:
        eventually(lambda: server.paths("/register"))
        assert fetcher.pid is not None
        assert SECRET.encode() not in Path(f"/proc/{fetcher.pid}/cmdline").read_bytes()
        # The test sees what there is to see: the token did travel.
        assert server.seen[-1].headers["authorization"] == f"Bearer {SECRET}"

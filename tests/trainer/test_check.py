"""`atropos-train check` against nothing, and against a real API and inference server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from atropos_client import AtroposClient
from local_stack.commands import Address, api_command
from tests.trainer.test_cli import atropos_train


@pytest.fixture
def api_url(free_port: int) -> Iterator[str]:
    """The real API server, in a process of its own."""
    process = subprocess.Popen(
        api_command(Address(port=free_port), python=sys.executable),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{free_port}"
    try:
        with AtroposClient(url) as client:
            client.wait_until_ready(60)
        yield url
    finally:
        process.kill()
        process.wait()


def test_every_party_that_is_missing_is_named_with_a_remedy(tmp_path: Path, free_port: int) -> None:
    nowhere = f"http://127.0.0.1:{free_port}"
    done = atropos_train(
        "check",
        *("--model.path", str(tmp_path / "nothing")),
        *("--atropos.url", nowhere),
        *("--publish.transport", "disk", "--publish.servers", nowhere),
        *("--train.output_dir", str(tmp_path / "run")),
        HF_HUB_OFFLINE="1",
    )
    assert done.returncode == 1
    for party in (
        "failed   model",
        "failed   Atropos API",
        f"failed   inference {nowhere}",
        "ok       output",
    ):
        assert party in done.stdout
    assert done.stdout.count("->") >= 3
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_whole_stack_passes_and_environments_may_come_later(
    api_url: str, inference_server: object, tiny_model_directory: Path, tmp_path: Path
) -> None:
    done = atropos_train(
        "check",
        *("--model.path", str(tiny_model_directory)),
        *("--atropos.url", api_url, "--atropos.max_token_length", "256"),
        *("--publish.transport", "disk", "--publish.servers", str(inference_server.url)),  # type: ignore[attr-defined]
        *("--train.output_dir", str(tmp_path / "run")),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "A run can start." in done.stdout
    assert "warning  environments: none has registered" in done.stdout
    assert "has every route that publishing needs" in done.stdout
    assert "tokenizes as the trainer does" in done.stdout


def test_a_directory_that_cannot_be_written_is_named(tiny_model_directory: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    done = atropos_train(
        "check", "--model.path", str(tiny_model_directory), "--train.output_dir", str(blocked / "run")
    )
    assert done.returncode == 1
    assert "failed   output" in done.stdout

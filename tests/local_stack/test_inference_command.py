"""The server as a process of its own: `python -m local_stack.inference`."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

COMMAND = [sys.executable, "-m", "local_stack.inference"]


def wait_until_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended early"
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    pytest.fail("the server did not get healthy")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_and_ends_cleanly_on_a_signal_with_a_request_in_flight(
    tiny_model_directory: Path, free_port: int, number: signal.Signals
) -> None:
    options = ["--model", str(tiny_model_directory), "--served-model-name", "tiny", "--port", str(free_port)]
    url = f"http://127.0.0.1:{free_port}"
    with subprocess.Popen([*COMMAND, *options, "--threads", "1"], stderr=subprocess.PIPE) as process:
        try:
            wait_until_healthy(url, process)
            assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "tiny"
            with httpx.stream(
                "POST",
                f"{url}/v1/completions",
                json={"prompt": [5], "max_tokens": 3, "n": 1, "ignore_eos": True},
            ) as reply:
                assert reply.status_code == 200
            process.send_signal(number)
            _, log = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert b"Traceback" not in log


@pytest.mark.slow
def test_a_model_that_is_not_there_ends_the_process_with_a_message(tmp_path: Path, free_port: int) -> None:
    result = subprocess.run(
        [*COMMAND, "--model", str(tmp_path / "nowhere"), "--port", str(free_port)],
        capture_output=True,
        check=False,
        timeout=120,
        env={"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
    )
    assert result.returncode == 1
    assert b"cannot serve" in result.stderr
    assert b"Traceback" not in result.stderr


def test_only_known_options_are_taken() -> None:
    from local_stack.inference.__main__ import main

    with pytest.raises(SystemExit) as caught:
        main(["--model", "x", "--dtype", "float8"])
    assert caught.value.code == 2

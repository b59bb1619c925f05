"""The server as a process of its own: `python -m local_stack.inference`."""

from __future__ import annotations

import logging
import signal
from pathlib import Path

import httpx
import pytest

from local_stack.health import answers
from local_stack.inference.__main__ import main
from tests.forked import Forked
from tests.local_stack.inference_reference import wait_for


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_and_ends_cleanly_on_a_signal_with_a_request_in_flight(
    tiny_model_directory: Path, free_port: int, tmp_path: Path, number: signal.Signals
) -> None:
    options = ("--model", tiny_model_directory, "--served-model-name", "tiny", "--port", free_port)
    log = tmp_path / "log"
    process = Forked("local_stack.inference", (*options, "--threads", 1), stdout=log)
    url = f"http://127.0.0.1:{free_port}"
    try:
        wait_for(lambda: process.poll() is not None or answers(f"{url}/health"), "the server to be healthy")
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "tiny"
        body = {"prompt": [5], "max_tokens": 3, "n": 1, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as reply:
            assert reply.status_code == 200
        process.send_signal(number)
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert "Traceback" not in log.read_text()


def test_a_model_that_is_not_there_ends_the_process_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        assert main(["--model", str(tmp_path / "nowhere"), "--port", "1"]) == 1
    assert "cannot serve" in caplog.text
    assert "Traceback" not in caplog.text


def test_only_known_options_are_taken() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--model", "x", "--dtype", "float8"])
    assert caught.value.code == 2

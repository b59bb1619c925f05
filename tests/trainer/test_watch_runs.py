"""Real runs as an orchestrator sees them: /health, /metrics, health.json, and ends by the watchdog."""

from __future__ import annotations

import json
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.trainer.test_stop_signals import ENDED_WITHIN, Run
from trainer.monitoring.server import MAX_CONNECTIONS
from trainer.monitoring.watchdog import STACKS_FILE, STUCK

pytestmark = pytest.mark.slow


def health_file(output: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((output / "health.json").read_text())
    return report


def wait_for_step(run: Run, output: Path, step: int) -> dict[str, Any]:
    deadline = time.monotonic() + ENDED_WITHIN
    while time.monotonic() < deadline:
        report = health_file(output)
        if report["step"] == step and report["phase"] == "waiting":
            return report
        time.sleep(0.1)
    raise AssertionError(run.log.read_text()[-3000:])


def test_a_run_tells_how_it_is_and_idle_clients_do_not_keep_it_from_that(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    words = ("--health.port", "0", "--health.prometheus", "true", "--health.file_every", "0.1")
    run = Run(tiny_model_directory, output, "wait", *words)
    run.wait_for("now")
    url = wait_for_step(run, output, 2)["url"]
    assert f"Health of the run: {url}/health" in run.log.read_text()
    address = (httpx.URL(url).host, httpx.URL(url).port)
    assert address[0] == "127.0.0.1"
    with ExitStack() as stack:
        for number in range(2 * MAX_CONNECTIONS):
            idle = stack.enter_context(socket.create_connection(address))
            if number % 2:
                idle.sendall(b"GET /health HTTP/1.1\r\n")  # and never ends it
        reply = httpx.get(f"{url}/health", timeout=60, trust_env=False)
        metrics = httpx.get(f"{url}/metrics", timeout=60, trust_env=False)
        page = httpx.get(f"{url}/", timeout=60, trust_env=False)
        state = httpx.get(f"{url}/api/state", timeout=60, trust_env=False).json()
        by_another_name = httpx.get(f"{url}/", headers={"Host": "evil.example"}, timeout=60, trust_env=False)
    assert reply.status_code == 200
    report = reply.json()
    expected = {
        "status": "ok",
        "phase": "waiting",
        "waiting_for": "recorded batches",
        "step": 2,
        "served_version": None,
        "batches_trained": 2,
        "batches_set_aside": 0,
        "batches_possibly_lost": 0,
        "pid": run.process.pid,
    }
    assert report | expected == report
    assert 0 < report["last_batch_age_seconds"] < 600
    assert report["phase_seconds"] < report["phase_deadline_seconds"] == 7200 + 600
    samples = {
        (sample.name, sample.labels.get("phase")): sample.value
        for family in text_string_to_metric_families(metrics.text)
        for sample in family.samples
    }
    assert samples["atropos_trainer_step", None] == 2
    assert samples["atropos_trainer_batches_trained_total", None] == 2
    assert samples["atropos_trainer_healthy", None] == 1
    assert samples["atropos_trainer_phase", "waiting"] == 1
    assert sum(value for (name, _), value in samples.items() if name == "atropos_trainer_phase") == 1
    assert ("atropos_trainer_served_version", None) not in samples
    assert f"Page of the run: {url}/" in run.log.read_text()
    assert "/assets/page.js" in page.text
    assert (state["newest"]["step"], state["live"], state["health"]["pid"]) == (2, True, run.process.pid)
    assert by_another_name.status_code == 421
    run.process.send_signal(signal.SIGTERM)
    assert run.ends_with() == 143
    assert health_file(output)["status"] == "ended"
    assert not (output / STACKS_FILE).exists()


def last_words_of_a_stuck_run(model: Path, directory: Path, way: str) -> str:
    """Let a run get stuck while it waits, and be ended for it; returns its log."""
    words = ("--watchdog.waiting_timeout", "5", "--watchdog.grace", "0.5")
    run = Run(model, directory / "run", way, *words)
    run.wait_for("now")
    assert run.ends_with() == STUCK
    said = run.log.read_text()
    assert "stuck in phase waiting" in said
    return said


def test_a_call_that_never_returns_ends_the_process_and_its_stack_says_which(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    said = last_words_of_a_stuck_run(tiny_model_directory, tmp_path, "stuck")
    assert "ending with exit code 75" in said
    for stacks in (said, (tmp_path / "run" / STACKS_FILE).read_text()):
        assert "in bodies_of" in stacks


def test_a_process_that_can_open_no_file_is_ended_with_its_stacks_too(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    said = last_words_of_a_stuck_run(tiny_model_directory, tmp_path, "no descriptors")
    assert "in bodies_of" in said
    assert "The stacks could not be written" in said.replace("\n", " ")


def test_a_call_that_lets_no_other_thread_run_ends_the_process_too(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    run = Run(tiny_model_directory, tmp_path / "run", "frozen", "--watchdog.frozen_timeout", "10")
    run.wait_for("now")
    assert run.ends_with() == 1
    assert "in bodies_of" in run.log.read_text()

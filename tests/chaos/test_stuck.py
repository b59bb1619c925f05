"""A run whose inference server hangs is ended by the watchdog, and the next start trains each batch once."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
import pytest

from local_stack.inference import Engine, EngineSettings
from tests.atropos_client.test_real_api import RealApi
from tests.chaos.stack import DEADLINE, RecordedEnvironment, Stack, recorded_groups
from trainer.monitoring.watchdog import STACKS_FILE, STUCK

STEPS = 8
PUBLISHING_TIMEOUT = 6.0
"""For the phase under test; the publish of an unchanged model at the start is over in a second."""
GRACE = 6.0
SETTINGS = (
    *("--watchdog.publishing_timeout", str(PUBLISHING_TIMEOUT), "--watchdog.grace", str(GRACE)),
    *("--health.port", "0", "--health.file_every", "0.2"),
)


class HangingEngine(Engine):
    """Does not load a new version until it is released; after that it takes its time."""

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        self.released = threading.Event()
        self.slow_for = 0.0

    async def reload_weights(self, directory: Path) -> None:
        """Hang, or dawdle; then load."""
        if directory.name != "v000000":
            await asyncio.to_thread(self.released.wait)
            await asyncio.sleep(self.slow_for)
        await super().reload_weights(directory)


def health(output: Path) -> httpx.Response | None:
    """What the run answers, once it answers."""
    try:
        url = json.loads((output / "health.json").read_text())["url"]
        return httpx.get(f"{url}/health", timeout=30, trust_env=False)
    except (OSError, httpx.TransportError):
        return None


def wait_for_status(process: BaseProcess, output: Path, status: int, phase: str) -> dict[str, Any]:
    deadline = time.monotonic() + DEADLINE
    last: httpx.Response | None = None
    while process.is_alive() and time.monotonic() < deadline:
        reply = health(output)
        last = reply or last
        if reply is not None and (reply.status_code, reply.json()["phase"]) == (status, phase):
            report: dict[str, Any] = reply.json()
            return report
        time.sleep(0.1)
    raise AssertionError(f"/health never answered {status} in phase {phase}: {last and last.text}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_publish_that_hangs_ends_the_run_and_the_next_start_trains_each_batch_once(
    tiny_model_directory: Path, tmp_path: Path, start_inference_server: Callable[..., Any]
) -> None:
    with RealApi() as api:
        server = start_inference_server(tiny_model_directory, engine_class=HangingEngine)
        engine: HangingEngine = server.engine
        RecordedEnvironment(api.url, recorded_groups(STEPS))
        stack = Stack(
            tmp_path / "run", model=tiny_model_directory, api=api.url, inference=server.url, steps=STEPS
        )
        try:
            process = stack.start(*SETTINGS)
            try:
                before = wait_for_status(process, stack.output, 200, "publishing")
                report = wait_for_status(process, stack.output, 503, "publishing")
                process.join(DEADLINE)
                assert process.exitcode == STUCK
            finally:
                process.kill()
        finally:
            engine.released.set()
        assert before["status"] in ("starting", "ok")
        assert report["status"] == "overdue"
        assert report["phase_seconds"] > report["phase_deadline_seconds"] == PUBLISHING_TIMEOUT
        assert server.url in report["waiting_for"]
        assert report["served_version"] == 0
        said = stack.log.read_text()
        assert "stuck in phase publishing for" in said.replace("\n", " ")
        kept = (stack.output / STACKS_FILE).read_text()
        assert f"waiting for the inference server {server.url}" in kept
        for stacks in (said, kept):  # the training thread, the publisher's, the watchdog's own
            assert stacks.count("most recent call first") >= 3
            assert "in settle" in stacks
            assert "in _complete" in stacks
            assert "in take_stacks" in stacks

        # Slow, and altogether longer than the deadline, but each publish within it.
        engine.slow_for = 1.2 * PUBLISHING_TIMEOUT / STEPS
        process = stack.start(*SETTINGS)
        try:
            process.join(DEADLINE)
            assert process.exitcode == 0, stack.log.read_text()[-3000:]
        finally:
            process.kill()
    assert [(row[0], row[3], row[4]) for row in stack.ledger()] == [
        (number, "trained", number) for number in range(1, STEPS + 1)
    ]
    assert [loss[:2] for loss in stack.losses()] == [(number, number) for number in range(1, STEPS + 1)]
    assert engine.weight_version == str(STEPS)
    assert json.loads((stack.output / "health.json").read_text())["status"] == "ended"
    assert (stack.output / STACKS_FILE).read_text() == kept

"""`atropos-train local --engine vllm`: the demonstration on stock vLLM, with a tiny model."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.launching import Launched
from tests.vllm.launching import VLLM_PYTHON

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WORDS = ("--engine", "vllm", "--vllm-python", str(VLLM_PYTHON), "--model", "tiny")
GONE_WITHIN = 60.0


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Launched]:
    launched = Launched(tmp_path / "run", *WORDS, "--steps", request.param)
    yield launched
    launched.clean_up()


@pytest.mark.parametrize("run", ["2"], indirect=True)
def test_a_whole_run_ends_with_proven_publishes_and_no_process(run: Launched) -> None:
    assert run.wait() == 0, run.output
    assert run.processes() == []
    # Its longest part: others may be over before anybody looks.
    assert "vLLM is importing its libraries" in run.output
    report = json.loads((run.run_dir / "report.json").read_text())
    assert report["publishes_made"] == report["publishes_verified"] == report["steps"] == 2
    assert report["publish_pause_seconds"] > 0
    log = (run.run_dir / "logs" / "inference-server.log").read_text()
    assert "version 0." in log
    assert "GET /weight_info" not in log


@pytest.mark.parametrize("run", ["100000"], indirect=True)
def test_nothing_is_left_of_vllm_when_the_launcher_is_killed(run: Launched) -> None:
    run.wait_until(lambda: run.steps_done() >= 1, "the first step was done")
    # Not by the mark in its environment: vLLM's engine and worker write their names over it.
    (server,) = (each for each in run.processes() if "vllm.entrypoints" in " ".join(each.cmdline()[:3]))
    family = [server, *server.children(recursive=True), *run.processes()]
    assert any("EngineCore" in each.name() for each in family)
    run.process.send_signal(signal.SIGKILL)
    run.process.wait()
    _, alive = psutil.wait_procs(family, timeout=GONE_WITHIN)
    for each in alive:
        each.kill()
    assert alive == []
    assert run.processes() == []

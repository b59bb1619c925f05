"""The pieces of the watch: clocks of phases, deadlines, the server's limits, a phase that ends after all."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import trainer.monitoring.server as server_module
from tests.forked import PROCESSES
from tests.trainer.batches import make_body
from trainer.config import TrainerConfig, load_config
from trainer.monitoring import Progress, RunPhase
from trainer.monitoring.health import health_report, metrics_page
from trainer.monitoring.phases import phase_deadlines
from trainer.monitoring.server import HealthServer, PageReply
from trainer.monitoring.watchdog import Watchdog
from trainer.publish.engines.connection import Deadline
from trainer.run.orders import next_batch
from trainer.run.processes import JoinedRun
from trainer.sources.incoming import IncomingBatch, read_incoming

PATIENCE = 60.0


def settings(*words: str) -> TrainerConfig:
    return load_config(None, ["--model.path", "m", *words], environment={})


def watch(progress: Progress, *words: str) -> Watchdog:
    config = settings(*words)
    return Watchdog(progress, phase_deadlines(config), config)


def test_an_outer_phase_does_not_count_the_time_of_an_inner_one() -> None:
    progress = Progress()
    with progress.phase(RunPhase.TRAINING, "the computation"):
        outer = progress.status.serial
        with progress.phase(RunPhase.PUBLISHING, "the servers"):
            assert (progress.status.phase, progress.status.party) == (RunPhase.PUBLISHING, "the servers")
            time.sleep(0.5)
            inner = progress.status.seconds()
        assert inner >= 0.5
        assert progress.status.phase is RunPhase.TRAINING
        assert progress.status.serial != outer
        began = time.monotonic() - progress.status.seconds()
        assert began > progress.status.since - 0.1
        with contextlib.suppress(ValueError), progress.phase(RunPhase.PUBLISHING, "the servers"):
            raise ValueError
        assert progress.status.phase is RunPhase.TRAINING, "an exception leaves a phase too"
    assert progress.status.phase is RunPhase.STARTING


def test_deadlines_lie_beyond_those_of_the_waits_inside() -> None:
    config = settings("--atropos.batch_timeout", "100000", "--publish.load_timeout", "50000")
    deadlines = phase_deadlines(config)
    assert deadlines[RunPhase.WAITING] > 100000
    assert deadlines[RunPhase.PUBLISHING] > 100000
    assert phase_deadlines(config, is_main_process=False)[RunPhase.WAITING] > 200000
    assert min(deadlines.values()) == deadlines[RunPhase.PREPARING] == 1800
    for phase in RunPhase:
        changed = phase_deadlines(settings(f"--watchdog.{phase}_timeout", "3"))
        assert changed[phase] == min(changed.values()) == 3


def test_the_report_says_starting_ok_overdue_and_stopping() -> None:
    progress, deadlines = Progress(), phase_deadlines(settings("--watchdog.preparing_timeout", "0.01"))
    assert health_report(progress, deadlines)["status"] == "starting"
    progress.begin(RunPhase.TRAINING, "the computation")
    assert health_report(progress, deadlines)["status"] == "ok"
    with progress.phase(RunPhase.PREPARING, "the preparation"):
        time.sleep(0.05)
        assert health_report(progress, deadlines)["status"] == "overdue"
    assert health_report(progress, deadlines)["status"] == "ok"
    progress.stopping = True
    assert health_report(progress, deadlines)["status"] == "stopping"


def test_every_number_of_the_report_is_in_the_metrics() -> None:
    words = ("status", "phase", "waiting_for", "silent_processes", "pid", "time")
    report = health_report(Progress(), phase_deadlines(settings()))
    numbers = {name: float(place) for place, name in enumerate(report) if name not in words}
    page = metrics_page(lambda: report | numbers | {"silent_processes": {"1": 31.0, "3": 40.0}})()
    samples = {
        sample.name.removeprefix("atropos_trainer_").removesuffix("_total"): sample.value
        for family in text_string_to_metric_families(page.body.decode())
        for sample in family.samples
        if not sample.labels
    }
    assert samples == numbers | {"silent_processes": 2.0, "healthy": 1.0}


def test_a_phase_that_ends_in_its_grace_lets_the_run_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    progress = Progress()
    asked = threading.Event()

    def details() -> str:
        asked.set()
        return "they said nothing"

    words = ("--watchdog.waiting_timeout", "0.1", "--watchdog.grace", str(PATIENCE))
    watchdog = watch(progress, *words, "--train.output_dir", str(tmp_path / "out"))
    with watchdog, caplog.at_level("INFO"):
        with progress.phase(RunPhase.WAITING, "the API", details):
            assert asked.wait(PATIENCE)
            until(lambda: "they said nothing" in text(tmp_path / "out" / "stacks.txt"))
        until(lambda: "has ended after all" in caplog.text)
    assert "waiting for the API: they said nothing" in caplog.text
    assert "in test_a_phase_that_ends_in_its_grace" in text(tmp_path / "out" / "stacks.txt")
    assert (tmp_path / "out" / "stacks.txt").stat().st_mode & 0o077 == 0


def test_a_long_phase_says_whom_it_waits_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    progress = Progress()
    words = ("--atropos.heartbeat_every", "0.2", "--train.output_dir", str(tmp_path))
    watchdog = watch(progress, *words)
    with caplog.at_level("INFO"), watchdog, progress.phase(RunPhase.PUBLISHING, "the inference server S"):
        until(lambda: caplog.text.count("waiting for the inference server S") >= 2)
    assert "still publishing after" in caplog.text


class SlowSource:
    """Has a batch once the process has stood still."""

    asked_at: float | None = None
    stood_still = False

    def get(self, _: float) -> IncomingBatch | None:
        before, self.asked_at = self.asked_at, time.monotonic()
        if before is None:
            print("waiting", flush=True)  # noqa: T201 - for the test, which stops this process then
        if self.stood_still:
            return read_incoming(make_body(1), served_version=0)
        self.stood_still = before is not None and self.asked_at - before > 4
        time.sleep(0.1)
        return None

    def describe_wait(self) -> str:
        return "nobody"


def wait_for_a_batch(printed: Path) -> None:
    """Wait with deadlines of four seconds."""
    sys.stdout = printed.open("w")
    progress, deadline = Progress(), Deadline(4.0)
    joined = JoinedRun(accelerator=SimpleNamespace(num_processes=1))
    source: Any = SlowSource()
    with progress.phase(RunPhase.WAITING, "nobody"):
        batch = next_batch(joined, source, timeout=4.0, stop_requested=lambda: False)
        assert len(batch.reply.groups) == 3
        assert deadline.left > 0
        assert progress.status.seconds() < 4


@pytest.mark.slow
def test_time_in_which_the_process_stood_still_counts_for_no_deadline(tmp_path: Path) -> None:
    """A batch that is there when the process goes on is taken, though the clock on the wall says too late."""
    child = PROCESSES.Process(target=wait_for_a_batch, args=(tmp_path / "printed",))
    child.start()
    try:
        until(lambda: "waiting" in text(tmp_path / "printed"))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGSTOP)
        time.sleep(6)
        os.kill(child.pid, signal.SIGCONT)
        child.join(PATIENCE)
    finally:
        child.kill()
    assert child.exitcode == 0


@pytest.fixture
def server() -> Iterator[HealthServer]:
    pages = {"/health": lambda: PageReply(HTTPStatus.OK, "text/plain", b"well")}
    with HealthServer("127.0.0.1", 0, pages) as running:
        yield running


def ask(server: HealthServer, request: bytes) -> bytes:
    """Everything that comes back until the server closes the connection."""
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        connection.sendall(request)
        received = b""
        while chunk := connection.recv(4096):
            received += chunk
    return received


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /health HTTP/1.1\r\n\r\n", b"200 OK"),
        (b"GET /health?full=1 HTTP/1.0\r\nHost: x\r\n\r\n", b"200 OK"),
        (b"GET / HTTP/1.1\r\n\r\n", b"404 Not Found"),
        (b"POST /health HTTP/1.1\r\n\r\n", b"405 Method Not Allowed"),
        (b"GET /health\r\n\r\n", b"400 Bad Request"),
        (b"\xff\x00 \xff HTTP/1.1\r\n\r\n", b"404 Not Found"),
        (b"GET /health HTTP/1.1\r\nX: " + b"x" * 9000, b"431 Request Header Fields Too Large"),
    ],
)
def test_requests_and_their_status(server: HealthServer, request_: bytes, status: bytes) -> None:
    reply = ask(server, request_)
    assert reply.startswith(b"HTTP/1.1 " + status + b"\r\n")
    assert b"\r\nConnection: close\r\n" in reply


def test_a_client_that_sends_nothing_is_sent_away(
    server: HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "CONNECTION_SECONDS", 0.2)
    assert ask(server, b"GET /health") == b""


def test_a_thousand_idle_connections_take_no_more_descriptors_than_the_bound(server: HealthServer) -> None:
    port = int(server.url.rpartition(":")[2])
    before, most = len(list(Path("/proc/self/fd").iterdir())), 0
    with contextlib.ExitStack() as stack:
        for count in range(1, 1001):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE))
            if count % 20 == 0:
                most = max(most, len(list(Path("/proc/self/fd").iterdir())) - before - count)
        assert ask(server, b"GET /health HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200 OK")
        assert most <= server_module.MAX_CONNECTIONS + 1


def test_a_page_that_fails_is_a_500() -> None:
    def fail() -> PageReply:
        raise RuntimeError("no report")

    with HealthServer("127.0.0.1", 0, {"/health": fail}) as server:
        assert ask(server, b"GET /health HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 500 ")


def until(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def text(path: Path) -> str:
    return path.read_text() if path.exists() else ""

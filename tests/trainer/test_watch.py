"""The pieces of the watch: clocks of phases, deadlines, the server's limits, a phase that ends after all."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import pytest

import trainer.watch._server as server_module
import trainer.watch._watchdog as watchdog_module
from trainer.config import TrainerConfig, load_config
from trainer.errors import ConfigurationError
from trainer.watch import Deadlines, HealthServer, Phase, Progress, Reply, Watchdog, health_report

PATIENCE = 60.0


def settings(*words: str) -> TrainerConfig:
    return load_config(None, ["--model.path", "m", *words], environment={})


def test_an_outer_phase_does_not_count_the_time_of_an_inner_one() -> None:
    progress = Progress()
    with progress.phase(Phase.TRAINING, "the computation"):
        outer = progress.status.serial
        with progress.phase(Phase.PUBLISHING, "the servers"):
            assert (progress.status.phase, progress.status.party) == (Phase.PUBLISHING, "the servers")
            time.sleep(0.5)
            inner = progress.status.seconds()
        assert inner >= 0.5
        assert progress.status.phase is Phase.TRAINING
        assert progress.status.serial != outer
        began = time.monotonic() - progress.status.seconds()
        assert began > progress.status.since - 0.1
    assert progress.status.phase is Phase.STARTING


def test_an_exception_leaves_a_phase_too() -> None:
    progress = Progress()
    with pytest.raises(ValueError, match="x"), progress.phase(Phase.TRAINING, "the computation"):
        raise ValueError("x")
    assert progress.status.phase is Phase.STARTING


def test_time_in_which_the_process_stood_still_does_not_count() -> None:
    progress = Progress()
    progress.stood_still(100.0)
    progress.stood_still(50.0)
    assert progress.status.seconds() < -100
    progress.begin(Phase.TRAINING, "the computation")
    assert progress.status.seconds() >= 0


def test_an_outer_phase_does_not_count_it_after_an_inner_one_either() -> None:
    progress = Progress()
    with progress.phase(Phase.TRAINING, "the computation"):
        progress.stood_still(100.0)
        with progress.phase(Phase.PUBLISHING, "the servers"):
            assert progress.status.seconds() >= 0
        assert progress.status.seconds() < 0
        progress.stood_still(1000.0)
        assert progress.status.seconds() < -1000
    assert progress.status.seconds() >= 0


def test_deadlines_lie_beyond_those_of_the_waits_inside() -> None:
    config = settings("--atropos.batch_timeout", "100000", "--publish.load_timeout", "50000")
    deadlines = Deadlines(config)
    assert deadlines.of(Phase.WAITING) > 100000
    assert deadlines.of(Phase.PUBLISHING) > 100000
    assert Deadlines(config, is_main_process=False).of(Phase.WAITING) > 200000
    assert deadlines.shortest == deadlines.of(Phase.PREPARING) == 1800
    for phase in Phase:
        changed = Deadlines(settings(f"--watchdog.{phase}_timeout", "3"))
        assert changed.of(phase) == changed.shortest == 3


def test_the_report_says_starting_ok_overdue_and_stopping() -> None:
    progress, deadlines = Progress(), Deadlines(settings("--watchdog.preparing_timeout", "0.01"))
    assert health_report(progress, deadlines)["status"] == "starting"
    progress.begin(Phase.TRAINING, "the computation")
    assert health_report(progress, deadlines)["status"] == "ok"
    with progress.phase(Phase.PREPARING, "the preparation"):
        time.sleep(0.05)
        assert health_report(progress, deadlines)["status"] == "overdue"
    assert health_report(progress, deadlines)["status"] == "ok"
    progress.stopping = True
    assert health_report(progress, deadlines)["status"] == "stopping"


def test_a_phase_that_ends_in_its_grace_lets_the_run_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    progress = Progress()
    asked = threading.Event()

    def details() -> str:
        asked.set()
        return "they said nothing"

    watchdog = Watchdog(
        progress,
        Deadlines(settings("--watchdog.waiting_timeout", "0.1")),
        grace=PATIENCE,
        frozen=600,
        remind_every=600,
        stacks=tmp_path / "out" / "stacks.txt",
    )
    with watchdog, caplog.at_level("INFO"):
        with progress.phase(Phase.WAITING, "the API", details):
            assert asked.wait(PATIENCE)
            until(lambda: "they said nothing" in text(tmp_path / "out" / "stacks.txt"))
        until(lambda: "has ended after all" in caplog.text)
    assert "waiting for the API: they said nothing" in caplog.text
    assert "in test_a_phase_that_ends_in_its_grace" in text(tmp_path / "out" / "stacks.txt")
    assert (tmp_path / "out" / "stacks.txt").stat().st_mode & 0o077 == 0


def test_a_long_phase_says_whom_it_waits_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    progress = Progress()
    deadlines = Deadlines(settings())
    watchdog = Watchdog(
        progress, deadlines, grace=1, frozen=600, remind_every=0.2, stacks=tmp_path / "stacks.txt"
    )
    with caplog.at_level("INFO"), watchdog, progress.phase(Phase.PUBLISHING, "the inference server S"):
        until(lambda: caplog.text.count("waiting for the inference server S") >= 2)
    assert "still publishing after" in caplog.text


class BlockedLog(logging.Handler):
    """Standard error that nobody reads, until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.released = threading.Event()

    def handle(self, record: logging.LogRecord) -> bool:
        """Wait; without the handler's lock, which the interpreter takes when it ends."""
        del record
        self.asked += 1
        return self.released.wait(PATIENCE)


@pytest.mark.slow
def test_a_log_that_blocks_the_watchdog_is_not_taken_for_a_process_that_stood_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog_module, "_PATIENCE_SECONDS", 15.0)
    monkeypatch.setattr(watchdog_module, "_STOOD_STILL_SECONDS", 12.0)  # a busy machine is not as late
    log, progress = BlockedLog(), Progress()
    watchdog = Watchdog(
        progress, Deadlines(settings()), grace=1, frozen=600, remind_every=0.1, stacks=tmp_path / "stacks.txt"
    )
    logger = logging.getLogger(watchdog_module.__name__)
    logger.addHandler(log)
    monkeypatch.setattr(logger, "level", logging.INFO)
    try:
        with watchdog, progress.phase(Phase.PUBLISHING, "the inference server S"):
            until(lambda: log.asked >= 2)  # it has gone once around the loop
            assert progress.status.frozen == 0
            log.released.set()
    finally:
        log.released.set()
        logger.removeHandler(log)


@pytest.fixture
def server() -> Iterator[HealthServer]:
    pages = {"/health": lambda: Reply(HTTPStatus.OK, "text/plain", b"well")}
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


def test_a_page_that_fails_is_a_500() -> None:
    def fail() -> Reply:
        raise RuntimeError("no report")

    with HealthServer("127.0.0.1", 0, {"/health": fail}) as server:
        assert ask(server, b"GET /health HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 500 ")


def test_a_port_in_use_is_a_clear_error(server: HealthServer) -> None:
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(ConfigurationError, match=f"health.port: cannot listen on 127.0.0.1:{port}"):
        HealthServer("127.0.0.1", port, {})


def until(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def text(path: Path) -> str:
    return path.read_text() if path.exists() else ""

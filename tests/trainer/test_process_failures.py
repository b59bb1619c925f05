"""Whatever ends one process of a run ends all of it, with one line that says which, and with a checkpoint."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.conftest import RunningInferenceServer
from tests.forked import Forked, forked_ranks
from tests.ports import free_port
from tests.trainer.stoppable_run import long_body
from tests.trainer.test_stop_signals import ENDED_WITHIN, Run, newest
from tests.trainer.test_watch import until
from tests.trainer.test_watch_runs import health_file, wait_for_step

pytestmark = pytest.mark.slow

MODULE = "tests.trainer.failing_run"
HOST = socket.gethostname()
OF_A_RANK = rf"rank (\d) on {re.escape(HOST)} \(process \d+\) "


def lines_of(log: str, start: str) -> list[str]:
    """The lines of a log that say what ended a process."""
    return [line for line in log.splitlines() if line.startswith(start)]


Cell = tuple[int, str]
"""The process that fails, and how."""


@contextmanager
def failing_runs(
    where: str, cells: list[Cell], model: Path, directory: Path, *settings: str
) -> Iterator[dict[Cell, list[Forked]]]:
    """Runs of two processes, all at once; each has a directory, and a log, with the name of its cell."""
    runs = {}
    for rank, how in cells:
        output = directory / f"{rank}-{how}"
        output.mkdir()
        words = [model, output, rank, where, how, "--checkpoint.every", "3", *settings]
        out, log = output.with_suffix(".out"), output.with_suffix(".log")
        runs[rank, how] = forked_ranks(2, free_port(), MODULE, words, stdout=out, stderr=log)
    try:
        yield runs
    finally:
        for process in (each for ranks in runs.values() for each in ranks):
            process.kill()


def codes_of(ranks: list[Forked], failing: Path) -> list[int]:
    """Exit codes of processes, which have 30 seconds from when one of them fails, as is promised."""
    begins_by = time.monotonic() + ENDED_WITHIN
    while not failing.exists():
        assert time.monotonic() < begins_by, failing.parent.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.05)
    ends_at = failing.stat().st_mtime + 30
    return [process.wait(max(0.1, ends_at - time.time())) for process in ranks]


@pytest.mark.parametrize(
    ("where", "steps"),
    [("starting", 0), ("waiting", 2), ("preparing", 2), ("step", 2), ("checkpointing", 3), ("stopping", 3)],
)
def test_the_failure_of_one_process_ends_all(
    where: str, steps: int, tiny_model_directory: Path, tmp_path: Path
) -> None:
    cells = [(0, "raise"), (0, "kill"), (1, "raise"), (1, "kill")]
    if where in ("preparing", "waiting"):  # which only process 0 does, or it alone ends
        cells = [*cells[:2], (1, "kill while")]
    last = ("--train.steps", "3") if where == "stopping" else ()
    with failing_runs(where, cells, tiny_model_directory, tmp_path, *last) as runs:
        codes = {
            (rank, how): codes_of(ranks, tmp_path / f"{rank}-{how}" / "failing")
            for (rank, how), ranks in runs.items()
        }
    for rank, how in cells:
        output = tmp_path / f"{rank}-{how}"
        said = output.with_suffix(".log").read_text()
        assert "Traceback" not in said
        assert codes[rank, how][1 - rank] == 1
        ends = lines_of(said, "atropos-train run")
        survivor = "atropos-train run: failed: " if rank == 1 else "atropos-train run [rank 1]: failed: "
        if how == "raise":
            of_it = [line for line in ends if "unexpected RuntimeError: nothing works" in line]
            assert len(of_it) == 1
            ends.remove(of_it[0])
        if (rank, how) == (0, "raise"):
            assert ends == [], "process 0 has said it"
        else:
            (told,) = ends
            found = re.match(re.escape(survivor) + OF_A_RANK + "(.*)", told)
            assert found, told
            assert found[1] == str(rank)
            cause = "failed: RuntimeError: nothing works" if how == "raise" else "has ended without a word"
            assert found[2].startswith(cause)
        if steps and (rank, how) != (0, "kill"):
            assert newest(output).state.step == steps or how == "kill while"


@pytest.mark.parametrize(
    "where",
    [
        *("forward training", "backward training", "forward publishing"),
        *("gather publishing", "send copies", "gather checkpointing", "write checkpointing"),
        *("send changes", "gather publishing, live", "gather stopping"),
    ],
)
def test_a_process_that_fails_while_others_wait_for_it_in_a_collective_ends_all(
    where: str, shared_inference_server: RunningInferenceServer, tmp_path: Path
) -> None:
    """Each in each way, four runs at a time."""
    cells = [(rank, how) for rank in (0, 1) for how in ("raise", "kill")]
    if where.startswith("write"):
        cells = [(0, "refuse"), (1, "refuse")]
    settings = ["--parallel.mode", "sharded"]
    if where.endswith(("publishing", "copies", "changes")):
        transport = "delta" if where == "send changes" else "disk"
        settings += ["--publish.transport", transport, "--publish.servers", shared_inference_server.url]
        settings += ["--publish.overlap", str(not where.endswith("publishing"))]
    where, _, live = where.partition(", ")
    if live:
        settings += ["--publish.transport", "nccl", "--publish.verify", "false"]
    if where == "gather stopping":
        settings += ["--train.steps", "3"]
    model = shared_inference_server.model_directory
    with failing_runs(where, cells, model, tmp_path, *settings) as runs:
        for (rank, how), ranks in runs.items():
            assert set(codes_of(ranks, tmp_path / f"{rank}-{how}" / "failing")) <= {1, -signal.SIGKILL}
    for rank, how in cells:
        said = (tmp_path / f"{rank}-{how}.log").read_text()
        assert "Traceback" not in said
        if how == "refuse":
            assert re.search(r"(\[rank 1\]|run \[rank 0 on .*) .*No space left on device", said), said
            continue
        told = lines_of(said, "atropos-train run")
        of_the_cause = [line for line in told if re.search(f"rank {rank} on {re.escape(HOST)}", line)]
        assert len(of_the_cause) == 1, said
        assert ("has ended without a word" if how == "kill" else "RuntimeError: nothing works") in said


def test_a_process_that_dies_during_a_publish_leaves_a_server_that_serves(
    inference_server: RunningInferenceServer, tmp_path: Path, free_port: int
) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    output.mkdir()
    words = [inference_server.model_directory, output, 1, "publishing", "kill while"]
    words += ["--publish.transport", "disk", "--publish.servers", inference_server.url]
    ranks = forked_ranks(2, free_port, MODULE, words, stdout=tmp_path / "out", stderr=log)
    try:
        assert ranks[0].wait(ENDED_WITHIN) == 1
    finally:
        for process in ranks:
            process.kill()
    (told,) = lines_of(log.read_text(), "atropos-train run")
    assert re.search("failed: " + OF_A_RANK + "has ended without a word", told)
    assert newest(output).state.step == 3, log.read_text()[-6000:]
    assert inference_server.complete([5, 50], max_tokens=1)


def torchrun(*words: object, module: str = MODULE) -> subprocess.Popen[str]:
    """Start a launcher, as users do, whose processes write to its pipes."""
    command = [sys.executable, "-m", "torch.distributed.run", *words[:-1], "-m", module, *words[-1]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([str(word) for word in command], env=environment, **pipes)


def ended(launchers: list[subprocess.Popen[str]]) -> str:
    """What the launchers and all that they started have printed, when they have ended."""
    try:
        return "".join(launcher.communicate(timeout=ENDED_WITHIN)[0] for launcher in launchers)
    finally:
        for launcher in launchers:
            launcher.terminate()


def is_taken(port: int) -> bool:
    """Whether something listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_the_failure_of_one_of_three_under_torchrun_is_said_by_process_0(
    tiny_model_directory: Path, tmp_path: Path, free_port: int
) -> None:
    output = tmp_path / "run"
    output.mkdir()
    words = [tiny_model_directory, output, 2, "step", "raise"]
    launcher = torchrun("--nproc_per_node", 3, "--master_port", free_port, words)
    said = ended([launcher])
    assert launcher.returncode == 1
    of_process_0 = lines_of(said, "atropos-train run: failed:")
    assert len(of_process_0) == 1, said[-3000:]
    assert re.search(OF_A_RANK + "failed: RuntimeError: nothing works", of_process_0[0])
    assert lines_of(said, "atropos-train run [rank 1]") == []
    assert newest(output).state.step == 2


def test_the_death_of_a_process_on_another_node_is_said_on_the_first(
    tiny_model_directory: Path, tmp_path: Path, free_port: int
) -> None:
    """Two launchers that find each other, as on two nodes."""
    output = tmp_path / "run"
    output.mkdir()
    meeting = ("--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port}", "--rdzv_id", "test")
    words = [tiny_model_directory, output, 1, "step", "kill"]
    first = torchrun("--nnodes", 2, "--nproc_per_node", 1, *meeting, words)
    until(lambda: is_taken(free_port))  # it keeps the place where they meet, as the first node has to
    said = ended([first, torchrun("--nnodes", 2, "--nproc_per_node", 1, *meeting, words)])
    assert "Training with 2 processes on 2 nodes" in said
    told = lines_of(said, "atropos-train run: failed:")
    assert len(told) == 1, said[-3000:]
    assert re.search(OF_A_RANK + "has ended without a word", told[0])
    assert newest(output).state.step == 2


def test_a_launcher_that_is_told_to_stop_leaves_time_to_give_up_a_long_step(
    tiny_model_directory: Path, tmp_path: Path, free_port: int
) -> None:
    """It kills what has not ended after 30 seconds. (With whole weights: `test_stop_signals`.)"""
    output = tmp_path / "run"
    output.mkdir()
    words = [tiny_model_directory, output, "long step", "--checkpoint.grace", "0"]
    words += ["--parallel.mode", "sharded"]
    launcher = torchrun(
        "--nproc_per_node", 2, "--master_port", free_port, words, module="tests.trainer.stoppable_run"
    )
    assert launcher.stdout is not None
    while launcher.stdout.readline() != "now\n":
        assert launcher.poll() is None
    time.sleep(0.5)  # well into its micro-batches
    launcher.terminate()
    said = ended([launcher])
    assert said.count("SIGTERM: stopping with a checkpoint") == 2
    assert said.count("Stopped after 2 optimizer steps (SIGTERM)") == 1, said[-3000:]
    assert newest(output).state.step == 2
    assert (output / "set_aside/batch-000003.json").read_bytes() == long_body()


def test_health_says_which_process_is_silent(
    tiny_model_directory: Path, tmp_path: Path, free_port: int
) -> None:
    output = tmp_path / "run"
    words = ("--health.file_every", "0.1", "--health.port", "0")
    run = Run(tiny_model_directory, output, "wait", *words, port=free_port)
    pid = int(run.wait_for("rank 1").split()[-1])
    run.wait_for("now")
    url = f"{wait_for_step(run, output, 2)['url']}/health"
    os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: health_file(output)["silent_processes"].get("1", 0) > 4)
        asked = httpx.get(url, timeout=60, trust_env=False).json()
        assert (asked["processes"], list(asked["silent_processes"])) == (2, ["1"])
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: health_file(output)["silent_processes"] == {})
    run.process.send_signal(signal.SIGTERM)
    assert run.ends_with() == 143

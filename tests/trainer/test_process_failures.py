"""Whatever ends one process of a run ends all of it, with one line that says which, and with a checkpoint."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from tests.forked import forked_ranks
from tests.trainer.test_stop_signals import ENDED_WITHIN, newest

pytestmark = pytest.mark.slow

MODULE = "tests.trainer.failing_run"
OF_A_RANK = rf"rank (\d) on {re.escape(socket.gethostname())} \(process \d+\) "


def lines_of(log: str, start: str) -> list[str]:
    """The lines of a log that say what ended a process."""
    return [line for line in log.splitlines() if line.startswith(start)]


@pytest.mark.parametrize("where", ["waiting", "preparing", "step", "checkpointing"])
@pytest.mark.parametrize(("rank", "how"), [(0, "raise"), (0, "kill"), (1, "raise"), (1, "kill")])
def test_the_failure_of_one_process_ends_all(
    rank: int, where: str, how: str, tiny_model_directory: Path, tmp_path: Path, free_port: int
) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    output.mkdir()
    if rank == 1 and where in ("preparing", "waiting"):  # which only process 0 does, or it alone ends
        how = "kill while"
    words = [tiny_model_directory, output, rank, where, how, "--checkpoint.every", "3"]
    ranks = forked_ranks(2, free_port, MODULE, words, stdout=tmp_path / "out", stderr=log)
    try:
        codes = [process.wait(ENDED_WITHIN) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    said = log.read_text()
    assert "Traceback" not in said
    assert codes[1 - rank] == 1
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
    if (rank, how) != (0, "kill"):
        step = newest(output).state.step
        assert step == (3 if where == "checkpointing" else 2) or how == "kill while"

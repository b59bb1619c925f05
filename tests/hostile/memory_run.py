"""How much memory each measured case takes, in a process of its own: prints one JSON object.

`python -m tests.hostile.memory_run MODEL DIRECTORY` trains on good batches first, so that everything
is loaded, and says by how many MiB the peak of resident memory grew with each case.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.atropos_client.misbehaving_server import Answer, MisbehavingServer
from tests.hostile.harness import PATIENCE, Training, script_api, train_over_http
from tests.hostile.table import REPLY_CASES


def peak_mebibytes() -> float:
    """Largest resident memory so far; Linux counts it in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1 << 20 if sys.platform == "darwin" else 1024
    )


def main(model: str, directory: str) -> None:
    growth: dict[str, float] = {}
    with MisbehavingServer() as server:

        def run(name: str, answers: Sequence[Answer], good: bytes, patience: float) -> None:
            script_api(server, [*answers, Answer(body=good)])
            train_over_http(
                Path(model),
                Path(directory) / name.replace(" ", "-"),
                server.url,
                Training(steps=1, patience=patience),
            )

        measured = [case for case in REPLY_CASES if case.measured]
        for number in range(2):
            run(f"warm {number}", [], measured[0].good_bodies()[-1], PATIENCE)
        for case in measured:
            before = peak_mebibytes()
            run(case.name, case.answers, case.good_bodies()[-1], case.patience)
            growth[case.name] = peak_mebibytes() - before
    sys.stdout.write(json.dumps(growth) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

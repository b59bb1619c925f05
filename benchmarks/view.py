"""How long the page of a long run takes in a real browser, from the address to drawn curves.

    python -m benchmarks.view --steps 100000 --repeats 5

A run directory with that many rows, as long as real ones, is shown by `atropos-train view`; chromium opens
it. The first visit after the server's start reads the whole file, the next ones only what is new.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from benchmarks._machine import describe, machine
from local_stack.command import positive
from local_stack.commands import free_addresses
from local_stack.health import answers

_VARIED = (
    "reward_mean",
    "loss",
    "grad_norm",
    "mismatch_kl",
    "entropy",
    "tokens_per_second",
    "policy_version",
)
_DRAWN = "() => document.querySelectorAll('figure[data-chart] canvas').length > 6"


def main() -> None:
    """Measure, then print a line for each kind of visit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.view", description=__doc__)
    parser.add_argument("--steps", type=positive, default=100_000)
    parser.add_argument("--repeats", type=positive, default=5)
    arguments = parser.parse_args()
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    first, again = [], []
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        size = _write_rows(Path(scratch) / "metrics.jsonl", arguments.steps)
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(arguments.repeats):
            with _served(Path(scratch)) as url:
                first.append(_seconds_to_curves(browser, url))
                again.append(_seconds_to_curves(browser, url))
    print(f"{arguments.steps:,} steps, {size / 2**20:.0f} MiB of rows; seconds until the curves are drawn")
    for name, seconds in (("first visit", first), ("next visit", again)):
        print(f"{name}: median {statistics.median(seconds):.2f}, longest {max(seconds):.2f}")
    print(describe(machine()))


def _write_rows(path: Path, steps: int) -> int:
    chance = random.Random(0)
    counters = {f"intake_counter_{number}": number for number in range(40)}
    with path.open("w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            varied = {name: chance.random() for name in _VARIED}
            row = {"kind": "step", "step": step, "batch": step, "staleness": 1, **varied, **counters}
            file.write(json.dumps(row) + "\n")
    return path.stat().st_size


@contextmanager
def _served(run: Path) -> Iterator[str]:
    (address,) = free_addresses(1)
    command = [sys.executable, "-m", "trainer.cli", "view", str(run), "--port", str(address.port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603 - our own program
    try:
        while not answers(f"{address.url}/"):
            if server.poll() is not None:
                raise SystemExit("the page's server ended")
            time.sleep(0.1)
        yield address.url
    finally:
        server.terminate()
        server.wait()


def _seconds_to_curves(browser: Browser, url: str) -> float:
    page = browser.new_page()
    started = time.perf_counter()
    page.goto(url)
    page.wait_for_function(_DRAWN)
    seconds = time.perf_counter() - started
    page.close()
    return seconds


if __name__ == "__main__":
    main()

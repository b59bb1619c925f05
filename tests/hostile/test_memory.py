"""Hostile sizes cost no more memory than the largest reply that is allowed."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from atropos_client._body import BodyReader
from tests.hostile.harness import MAX_BODY_BYTES
from tests.hostile.table import REPLY_CASES


@pytest.mark.slow
def test_bombs_giants_and_nesting_take_a_few_times_the_largest_reply(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.hostile.memory_run", str(tiny_model_directory), str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, timeout=240)
    growth: dict[str, float] = json.loads(done.stdout)
    assert growth.keys() == {case.name for case in REPLY_CASES if case.measured}
    assert len(growth) >= 5
    # 4 GiB are sent by the largest of them. The buffer, its copy, and what the allocator keeps of both.
    allowed = 4 * MAX_BODY_BYTES / (1 << 20)
    # Together, because a peak hides smaller ones after it.
    assert sum(growth.values()) < allowed, growth


class Chunks(httpx.SyncByteStream):
    """So many pieces of two bytes."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[bytes]:
        return (bytes([number % 251, 1]) for number in range(self.number))


def test_a_body_in_tiny_chunks_takes_no_more_memory_than_its_bytes() -> None:
    chunks = 200_000
    reader = BodyReader(limit=1 << 20, patience=600.0)
    reply = httpx.Response(200, stream=Chunks(chunks))
    tracemalloc.start()
    try:
        body = reader.read(reply)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(body) == 2 * chunks
    assert peak < 4 * len(body)

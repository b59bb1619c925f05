"""Reads `metrics.jsonl` of a run of any length, and samples its curves down to what a chart can show.

Rows are appended while the run goes on, so each call reads what is new. Of a long run every k-th row is kept:
`KEPT_ROWS` bounds time and memory. Where a reader zooms in, the rows of that range are read from the file.
"""

from __future__ import annotations

import json
import math
import os
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

KEPT_ROWS: Final = 2048
"""Rows of one kind that are kept at least, once there are as many; twice as many at most."""
LARGEST_LINE: Final = 1 << 20
"""A longer line is no row of ours."""

_KINDS: Final = {b'{"kind": "step"': "step", b'{"kind": "publish"': "publish"}
_SKIPPED: Final = b'{"kind": "skipped"'
_NEWEST_SKIPPED: Final = 200
_NOT_DRAWN: Final = {"kind", "step", "version", "policy_version"}

Row = dict[str, Any]


@dataclass
class Series:
    """The numbers of every `stride`-th row of one kind, by step; of publishes, by version."""

    stride: int = 1
    seen: int = 0
    steps: array[int] = field(default_factory=lambda: array("q"))
    offsets: array[int] = field(default_factory=lambda: array("q"))
    """Where each row begins in the file."""
    columns: dict[str, array[float]] = field(default_factory=dict)
    """NaN where a row lacks the number."""

    @property
    def wants_next(self) -> bool:
        """Whether the next row is one of those that are kept; counts it."""
        self.seen += 1
        return (self.seen - 1) % self.stride == 0

    def add(self, row: Row, offset: int) -> None:
        """Keep a row; thins the others out when there are too many."""
        step = row.get("step")
        if not isinstance(step, int):
            return
        before = len(self.steps)
        self.steps.append(step)
        self.offsets.append(offset)
        for name, value in row.items():
            if isinstance(value, int | float) and name not in _NOT_DRAWN:
                column = self.columns.get(name)
                if column is None:
                    column = self.columns[name] = array("d", [math.nan]) * before
                column.append(value)
        for column in self.columns.values():
            if len(column) == before:
                column.append(math.nan)
        if len(self.steps) >= 2 * KEPT_ROWS:
            self.stride *= 2
            self.steps, self.offsets = self.steps[::2], self.offsets[::2]
            self.columns = {name: column[::2] for name, column in self.columns.items()}

    def sampled(
        self, names: Sequence[str], *, first: int | None, last: int | None, points: int
    ) -> dict[str, Any]:
        """Sample columns between two steps down to at most `points` buckets of equally many rows.

        Returns:
            `steps`, the last of each bucket; `every`, the rows of which one was read; and by column the
            lists `mean`, `low` and `high`, with null where no row has the number.
        """
        start = 0 if first is None else bisect_left(self.steps, first)
        end = len(self.steps) if last is None else bisect_left(self.steps, last + 1)
        count = end - start
        edges = np.unique(np.linspace(0, count, min(points, count) + 1).astype(np.int64))[:-1]
        ends = [*edges.tolist()[1:], count] if count else []
        known = {name: self.columns[name] for name in names if name in self.columns}
        return {
            "steps": [self.steps[start + each - 1] for each in ends],
            "every": self.stride,
            "columns": {
                name: _bucketed(np.asarray(column[start:end]), edges) for name, column in known.items()
            },
        }


def _bucketed(values: np.ndarray, edges: np.ndarray) -> dict[str, list[float | None]]:
    if not len(edges):
        return {"mean": [], "low": [], "high": []}
    is_known = ~np.isnan(values)
    counts = np.add.reduceat(is_known, edges, dtype=np.int64)
    sums = np.add.reduceat(np.where(is_known, values, 0.0), edges)
    lows = np.fmin.reduceat(values, edges)
    highs = np.fmax.reduceat(values, edges)
    means = np.divide(sums, counts, out=np.full(len(edges), np.nan), where=counts > 0)
    return {"mean": _plain(means), "low": _plain(lows), "high": _plain(highs)}


def _plain(values: np.ndarray) -> list[float | None]:
    """JSON's numbers, six digits of each: more no chart shows."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]


class MetricSeries:
    """The rows of one `metrics.jsonl`, as far as they have been read.

    Args:
        path: The file; need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._forget()

    def _forget(self) -> None:
        self._file_id = -1
        self._offset = 0
        self.series = {"step": Series(), "publish": Series()}
        """By kind of row."""
        self.skipped: list[Row] = []
        """Rows of the newest batches that were passed over."""
        self.skipped_count = 0
        """How many there are in all."""
        self.newest: Row = {}
        """The newest row of a step, whole."""
        self.newest_publish: Row = {}
        """The newest row of a publish, whole."""
        self.unreadable = 0
        """Lines that are no rows."""

    @property
    def position(self) -> int:
        """How far the file has been read, in bytes: changes whenever there is something new."""
        return self._offset

    def read_new(self) -> None:
        """Read what was appended since the last call; all of it where a resumed run rewrote the file."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._file_id or status.st_size < self._offset:
                    self._forget()
                    self._file_id = status.st_ino
                    self._expect(file, status.st_size)
                file.seek(self._offset)
                last: dict[str, tuple[bytes, int]] = {}
                for offset, line in _whole_lines(file, self._offset):
                    self._offset = offset + len(line)
                    self._take(line, offset, last)
        except FileNotFoundError:
            return
        for kind, (line, _) in last.items():
            row = self._parsed(line)
            if row is not None and kind == "step":
                self.newest = row
            elif row is not None:
                self.newest_publish = row

    def _expect(self, file: BinaryIO, size: int) -> None:
        """Of a file that is long already, parse no more rows than will be kept."""
        head = file.read(LARGEST_LINE)
        rows = size * head.count(b"\n") // max(1, len(head))
        stride = 1
        while rows >= 2 * KEPT_ROWS * stride:
            stride *= 2
        self.series["step"].stride = stride

    def _take(self, line: bytes, offset: int, last: dict[str, tuple[bytes, int]]) -> None:
        kind = _KINDS.get(line[: line.find(b",")])
        if kind is not None:
            last[kind] = (line, offset)
            if self.series[kind].wants_next and (row := self._parsed(line)) is not None:
                self.series[kind].add(row, offset)
        elif line.startswith(_SKIPPED):
            row = self._parsed(line)
            if row is not None:
                self.skipped_count += 1
                kept = {name: row.get(name) for name in ("step", "batch", "reason")}
                self.skipped = [*self.skipped, kept][-_NEWEST_SKIPPED:]
        else:
            self.unreadable += 1

    def _parsed(self, line: bytes) -> Row | None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            self.unreadable += 1
            return None
        return row

    def window(self, kind: str, first: int, last: int) -> Series:
        """Read the rows of a kind between two steps from the file: all, or as many as are kept at most."""
        kept = self.series[kind]
        start = max(0, bisect_left(kept.steps, first) - 1)
        end = bisect_left(kept.steps, last + 1)
        if kept.stride == 1 or start >= end:
            return kept
        until = kept.offsets[end] if end < len(kept.offsets) else self._offset
        rows = (end - start) * kept.stride
        window = Series(stride=max(1, rows // KEPT_ROWS))
        with self._path.open("rb") as file:
            file.seek(kept.offsets[start])
            for offset, line in _whole_lines(file, kept.offsets[start]):
                if offset >= until:
                    break
                of_kind = _KINDS.get(line[: line.find(b",")]) == kind
                if of_kind and window.wants_next and (row := self._parsed(line)) is not None:
                    window.add(row, offset)
        return window


def _whole_lines(file: BinaryIO, offset: int) -> Iterator[tuple[int, bytes]]:
    """Yield each line that has its end, with where it begins; one that is too long is passed over."""
    while True:
        line = file.readline(LARGEST_LINE)
        if not line.endswith(b"\n"):
            if len(line) < LARGEST_LINE:
                return  # being written
            while line and not line.endswith(b"\n"):
                offset += len(line)
                line = file.readline(LARGEST_LINE)
            offset += len(line)
            continue
        yield offset, line
        offset += len(line)

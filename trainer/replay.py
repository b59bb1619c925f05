"""Training from recorded batches: journals of runs, and files that environments wrote.

::

    journal directory            its batches, in order of arrival or as they were trained on
    journal export (.jsonl)      its batches, one a line (`atropos-train journal export`)
    group file (.jsonl)          one group a line, as environments write with `data_path_to_save_groups`,
                                 gathered into batches of `atropos.batch_size` sequences
    supervised file (.jsonl)     one text a line, as `atropos-sft-gen` writes: {"prefix", "completion",
                                 "score"} or {"messages", "score"}; becomes a group of one sequence whose
                                 completion is trained on with advantage 1

A `ReplaySource` gives them to the same loop as a live run. Nothing is sent anywhere.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from atropos_client import NoSuchBatch, parse_batch
from atropos_client.errors import InvalidReply
from atropos_client.journal import Journal
from trainer.errors import DataError
from trainer.sources import EndOfBatches, IncomingBatch

logger = logging.getLogger(__name__)

Order = Literal["arrival", "ledger"]
"""Of a journal: every batch as it came, or only those that the run trained on, in the order of its steps."""

Encode = Callable[[dict[str, Any]], dict[str, Any]]
"""Makes a group of one sequence of a line of a supervised file; see `trainer.supervised`."""

_JOURNAL_FILE = "journal.sqlite3"
_UNKNOWN_VERSION = -1


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    body: bytes
    served_version: int


class ReplaySource:
    """A `BatchSource` over recordings, in the order given.

    Args:
        paths: Journals (or output directories that hold one) and JSONL files.
        batch_size: Sequences that groups are gathered to.
        encode: For supervised files. None: they are refused.
        order: Of journals.
        train_partial: Whether a last batch with fewer than `batch_size` sequences is given out.
        skip: Batches to pass over at the start: those that a checkpoint counts.

    Raises:
        DataError: A path is not there, or no recording.
    """

    party = "recorded batches"

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        batch_size: int,
        encode: Encode | None = None,
        order: Order = "arrival",
        train_partial: bool = True,
        skip: int = 0,
    ) -> None:
        self._paths = [find_recording(path) for path in paths]
        self._batch_size = batch_size
        self._encode = encode
        self._order = order
        self._train_partial = train_partial
        self._skip = skip
        self._counts: Counter[str] = Counter()
        self._batches: Iterator[_Recorded] = iter(())

    def start(self) -> None:
        """Open the recordings."""
        self._batches = self._read()
        for _ in range(self._skip):
            next(self._batches, None)

    def get(self, timeout: float) -> IncomingBatch | None:
        """Return the next batch.

        Raises:
            EndOfBatches: All were given out.
            DataError: A recording cannot be read any further.
        """
        del timeout
        for recorded in self._batches:
            try:
                reply = parse_batch(recorded.body)
            except InvalidReply as error:
                self._counts["replay_unreadable_batches"] += 1
                logger.warning("A recorded batch is passed over: %s", error)
                continue
            if reply.state == "ready":
                self._counts["replay_batches"] += 1
                return IncomingBatch(reply=reply, body=recorded.body, served_version=recorded.served_version)
        raise EndOfBatches

    def describe_wait(self) -> str:
        """Recordings are never late."""
        return "recorded batches"

    def counters(self) -> dict[str, int]:
        """What was given out and what was passed over, names prefixed `replay_`."""
        return dict(self._counts)

    def stop(self) -> list[bytes]:
        """Close the recordings; nothing is fetched early."""
        self._batches = iter(())
        return []

    def count(self) -> int:
        """Batches that it gives out in all, those to skip included. Reads all files once, no journal."""
        files = ReplaySource(
            [path for path in self._paths if not path.is_dir()],
            batch_size=self._batch_size,
            # The number of sequences is what counts, and that is one a line.
            encode=None if self._encode is None else lambda line: {"tokens": [[0]]},
            train_partial=self._train_partial,
        )
        count = sum(1 for _ in files._read())
        for directory in (path for path in self._paths if path.is_dir()):
            with Journal.read_only(directory) as journal:
                count += len(self._numbers(journal))
        return count

    def _read(self) -> Iterator[_Recorded]:
        gathered = _Gatherer(self._batch_size)
        for path in self._paths:
            if path.is_dir():
                yield from self._read_journal(path)
            else:
                yield from self._read_file(path, gathered)
        rest = gathered.take()
        if rest is not None:
            what = "trained on as it is" if self._train_partial else "left"
            logger.warning("The last batch has %d of %d sequences: %s.", rest[1], self._batch_size, what)
            self._counts["replay_partial_batches"] += 1
            if self._train_partial:
                yield _Recorded(body=rest[0], served_version=_UNKNOWN_VERSION)

    def _read_journal(self, directory: Path) -> Iterator[_Recorded]:
        with Journal.read_only(directory) as journal:
            for number in self._numbers(journal):
                try:
                    batch = journal.read(number)
                except NoSuchBatch as error:
                    raise DataError(
                        f"{error}: it was behind the oldest checkpoint that the run kept, so that this "
                        "journal cannot be replayed from its beginning"
                    ) from error
                yield _Recorded(body=batch.body, served_version=batch.entry.served_version)

    def _numbers(self, journal: Journal) -> list[int]:
        if self._order == "arrival":
            return journal.numbers_after(0)
        trained = [entry for entry in journal.ledger() if entry.outcome == "trained"]
        return [entry.number for entry in sorted(trained, key=lambda each: (each.step or 0, each.number))]

    def _read_file(self, path: Path, gathered: _Gatherer) -> Iterator[_Recorded]:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                line = self._parse(raw, path, number)
                if line is None:
                    continue
                if "reply" in line:
                    if line["reply"] is not None:
                        body = json.dumps(line["reply"]).encode()
                        yield _Recorded(
                            body=body, served_version=line.get("served_version", _UNKNOWN_VERSION)
                        )
                    continue
                group, sequences = self._group(line, raw, path, number)
                full = gathered.add(group, sequences)
                if full is not None:
                    yield _Recorded(body=full, served_version=_UNKNOWN_VERSION)

    def _parse(self, raw: bytes, path: Path, number: int) -> dict[str, Any] | None:
        if not raw.strip():
            return None
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError) as error:  # the last line of an environment that was killed, say
            line = str(error)
        if isinstance(line, dict):
            return line
        self._counts["replay_unreadable_lines"] += 1
        logger.warning("Line %d of %s is passed over: no JSON object (%s)", number, path, str(line)[:80])
        return None

    def _group(self, line: dict[str, Any], raw: bytes, path: Path, number: int) -> tuple[bytes, int]:
        """A line as the JSON of a group, and how many sequences it has."""
        if "tokens" in line:
            return raw.strip(), len(line["tokens"]) if isinstance(line["tokens"], list) else 0
        if "neg" in line:
            raise DataError(
                f"line {number} of {path} holds a pair of texts, as atropos-dpo-gen writes; there is no loss "
                "for pairs. Record with data_path_to_save_groups or atropos-sft-gen instead"
            )
        if self._encode is not None and ("messages" in line or {"prefix", "completion"} <= line.keys()):
            return json.dumps(self._encode(line)).encode(), 1
        raise DataError(
            f"line {number} of {path} is no group (no field 'tokens') and no supervised text ('prefix' and "
            f"'completion', or 'messages'); it has: {', '.join(list(line)[:8]) or 'nothing'}"
        )


class _Gatherer:
    """Gathers groups to batches that have at most `batch_size` sequences, unless one group has more."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._groups: list[bytes] = []
        self._sequences = 0

    def add(self, group: bytes, sequences: int) -> bytes | None:
        """Add a group; returns a batch if one is complete."""
        complete = None
        if self._groups and self._sequences + sequences > self._batch_size:
            complete = self._body()
        self._groups.append(group)
        self._sequences += sequences
        if complete is None and self._sequences >= self._batch_size:
            complete = self._body()
        return complete

    def take(self) -> tuple[bytes, int] | None:
        """Return what is left and its number of sequences."""
        sequences = self._sequences
        return (self._body(), sequences) if self._groups else None

    def _body(self) -> bytes:
        body = b'{"batch":[' + b",".join(self._groups) + b"]}"
        self._groups, self._sequences = [], 0
        return body


def find_recording(path: Path) -> Path:
    """Find the journal directory or file that a user means.

    Raises:
        DataError: There is none.
    """
    for candidate in (path, path / "journal"):
        if (candidate / _JOURNAL_FILE).is_file():
            return candidate
    if path.is_file():
        return path
    what = "no journal is in it" if path.is_dir() else "it does not exist"
    raise DataError(
        f"nothing can be replayed from {path}: {what}; give a journal's directory or a JSONL file"
    )

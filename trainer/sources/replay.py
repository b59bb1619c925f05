"""Training from recorded batches: journals of runs, and files that environments wrote.

::

    journal directory            its batches, in order of arrival or as they were trained on
    journal export (.jsonl)      its batches, one a line (`atropos-train journal export`)
    group file (.jsonl)          one group a line, as environments write with `data_path_to_save_groups`,
                                 gathered into batches of `atropos.batch_size` sequences
    supervised file (.jsonl)     one text a line, as `atropos-sft-gen` writes: {"prefix", "completion",
                                 "score"} or {"messages", "score"}; becomes a group of one sequence whose
                                 completion is trained on with advantage 1; passed over if the score is 0 or
                                 less

A `ReplaySource` gives them to the same loop as a live run. Nothing is sent anywhere.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from atropos_client import JournalError, NoSuchBatch, parse_batch
from atropos_client.errors import InvalidReply
from atropos_client.journal import JOURNAL_FILE, Journal
from atropos_client.readable import require_readable, why_not_there
from schemas import count_of
from trainer.errors import ConfigurationError, DataError
from trainer.sources.incoming import EndOfBatches, IncomingBatch
from trainer.sources.sft_files import is_example

logger = logging.getLogger(__name__)

Order = Literal["arrival", "ledger"]
"""Of a journal: every batch as it came, or only those that the run trained on, in the order of its steps."""

Encode = Callable[[dict[str, Any]], dict[str, Any]]
"""Makes a group of one sequence of a line of a supervised file; see `trainer.sources.sft_files`."""

_UNKNOWN_VERSION = -1
_OTHER_FORMS = {
    b"\x1f\x8b": "compressed with gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"PK": "a zip archive",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}
"""By the first bytes of a file."""


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    body: bytes
    served_version: int


@dataclass(frozen=True, kw_only=True)
class _Group:
    text: bytes
    sequences: int


class ReplaySource:
    """A `BatchSource` over recordings, in the order given.

    Args:
        paths: Journals (or output directories that hold one) and JSONL files.
        batch_size: Sequences that groups are gathered to.
        encode: For supervised files. None: they are refused.
        order: Of journals.
        train_partial: Whether a last batch with fewer than `batch_size` sequences is given out.

    Raises:
        ConfigurationError: A path is not there, or no recording.
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
    ) -> None:
        self._paths = [find_recording(path) for path in paths]
        self._batch_size = batch_size
        self._encode = encode
        self._order = order
        self._train_partial = train_partial
        self._counts: Counter[str] = Counter()
        self._batches: Iterator[IncomingBatch] | None = None

    def require_batches(self) -> None:
        """Read the first batch of each recording.

        Raises:
            ConfigurationError: One cannot be read, or has none.
        """
        for path in self._paths:
            first = ReplaySource([path], batch_size=1, encode=self._encode, order=self._order)
            try:
                next(first._given())
            except (DataError, JournalError) as error:
                raise ConfigurationError(str(error)) from error

    def start(self) -> None:
        """Open the recordings, unless they are open."""
        if self._batches is None:
            self._batches = self._given()

    def pass_over(self, count: int, *, position: str) -> None:
        """Open the recordings, and pass over what a checkpoint counts: `count` batches with this digest.

        Raises:
            ConfigurationError: That are other batches than the checkpoint was trained on.
        """
        self.start()
        last = None
        for _ in range(count):
            last = next(self._batches or iter(()), None)
        if position != (last.position if last is not None else ""):
            raise ConfigurationError(
                f"the first {count_of(count, 'batch')} of these recordings are not what the newest "
                "checkpoint was trained on: the files, --replay.order or atropos.batch_size are others. Give "
                "what the run was begun with, or another train.output_dir to begin anew"
            )
        self._counts.clear()

    def get(self, timeout: float) -> IncomingBatch | None:
        """Return the next batch.

        Raises:
            EndOfBatches: All were given out.
            DataError: A recording cannot be read any further.
        """
        del timeout
        batch = next(self._batches or iter(()), None)
        if batch is None:
            raise EndOfBatches
        self._counts["replay_batches"] += 1
        return batch

    def _given(self) -> Iterator[IncomingBatch]:
        position = ""
        for recorded in self._read():
            try:
                reply = parse_batch(recorded.body)
            except InvalidReply as error:
                self._counts["replay_unreadable_batches"] += 1
                logger.warning("A recorded batch is passed over: %s", error)
                continue
            if reply.state == "ready":
                position = hashlib.sha256(position.encode() + recorded.body).hexdigest()
                yield IncomingBatch(
                    reply=reply,
                    body=recorded.body,
                    position=position,
                    served_version=recorded.served_version,
                )
        if not position:
            raise self._nothing()

    def _nothing(self) -> DataError:
        passed_over = ", ".join(f"{name} {count}" for name, count in self._counts.items())
        return DataError(
            f"there is no batch to replay in {', '.join(map(str, self._paths))} ({passed_over or 'empty'})"
        )

    def describe_wait(self) -> str:
        """Recordings are never late."""
        return "recorded batches"

    def counters(self) -> dict[str, int]:
        """Count what was given out and what was passed over, names prefixed `replay_`."""
        return dict(self._counts)

    def stop(self) -> list[bytes]:
        """Close the recordings; nothing is fetched early."""
        self._batches = iter(())
        return []

    def count(self) -> int:
        """Batches that it gives out in all, those to skip included. Reads all files once, no journal.

        Raises:
            DataError: There is none.
        """
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
        if not count:
            self._counts += files._counts
            raise self._nothing()
        return count

    def _read(self) -> Iterator[_Recorded]:
        """Yield batches; groups are gathered to at most `batch_size` sequences, unless one group has more."""
        groups: list[_Group] = []
        for path in self._paths:
            for each in self._read_journal(path) if path.is_dir() else self._read_file(path):
                if isinstance(each, _Recorded):
                    yield each
                    continue
                if groups and _count(groups) + each.sequences > self._batch_size:
                    yield _gathered(groups)
                    groups = []
                groups.append(each)
                if _count(groups) >= self._batch_size:
                    yield _gathered(groups)
                    groups = []
        if groups:
            what = "trained on as it is" if self._train_partial else "left"
            logger.warning(
                "The last batch has %d of %d sequences: %s.", _count(groups), self._batch_size, what
            )
            self._counts["replay_partial_batches"] += 1
            if self._train_partial:
                yield _gathered(groups)

    def _read_journal(self, directory: Path) -> Iterator[_Recorded]:
        with Journal.read_only(directory) as journal:
            for number in self._numbers(journal):
                try:
                    batch = journal.read(number)
                except NoSuchBatch as error:
                    raise DataError(
                        f"{error}: it was behind the oldest checkpoint that the run kept, so that this "
                        "journal cannot be replayed from its beginning; a run with --journal.prune false "
                        "keeps every body"
                    ) from error
                yield _Recorded(body=batch.body, served_version=batch.entry.served_version)

    def _numbers(self, journal: Journal) -> list[int]:
        if self._order == "arrival":
            return [entry.number for entry in journal.ledger() if entry.skip_reason is None]
        trained = [entry for entry in journal.ledger() if entry.outcome == "trained"]
        return [entry.number for entry in sorted(trained, key=lambda each: (each.step or 0, each.number))]

    def _read_file(self, path: Path) -> Iterator[_Recorded | _Group]:
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
                if _is_supervised(line) and not is_example(line):
                    self._pass_over_text(path, number, line)
                    continue
                yield self._group(line, raw, path, number)

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

    def _pass_over_text(self, path: Path, number: int, line: dict[str, Any]) -> None:
        if not self._counts["replay_texts_without_score"]:
            logger.warning(
                "Line %d of %s has score %s. Texts are trained on with advantage 1, so those with a score of "
                "0 or less are passed over, here and below (replay_texts_without_score counts them).",
                number,
                path,
                line["score"],
            )
        self._counts["replay_texts_without_score"] += 1

    def _group(self, line: dict[str, Any], raw: bytes, path: Path, number: int) -> _Group:
        if "tokens" in line:
            sequences = len(line["tokens"]) if isinstance(line["tokens"], list) else 0
            return _Group(text=raw.strip(), sequences=sequences)
        if "neg" in line:
            raise DataError(
                f"line {number} of {path} holds a pair of texts, as atropos-dpo-gen writes; there is no loss "
                "for pairs. Record with data_path_to_save_groups or atropos-sft-gen instead"
            )
        if self._encode is not None and _is_supervised(line):
            try:
                return _Group(text=json.dumps(self._encode(line)).encode(), sequences=1)
            except DataError as error:
                raise DataError(f"line {number} of {path}: {error}") from error
        raise DataError(
            f"line {number} of {path} is no group (no field 'tokens') and no supervised text ('prefix' and "
            f"'completion', or 'messages'); it has: {', '.join(list(line)[:8]) or 'nothing'}"
        )


def _is_supervised(line: dict[str, Any]) -> bool:
    return "tokens" not in line and ("messages" in line or {"prefix", "completion"} <= line.keys())


def _count(groups: list[_Group]) -> int:
    return sum(group.sequences for group in groups)


def _gathered(groups: list[_Group]) -> _Recorded:
    body = b'{"batch":[' + b",".join(group.text for group in groups) + b"]}"
    return _Recorded(body=body, served_version=_UNKNOWN_VERSION)


def find_recording(path: Path) -> Path:
    """Find the journal directory or file that a user means.

    Raises:
        ConfigurationError: There is none.
    """
    for candidate in (path, path / "journal"):
        if (candidate / JOURNAL_FILE).is_file():
            return candidate
    if path.is_file():
        found = _why_no_json_lines(path)
        if found is None:
            return path
    elif path.is_dir():
        found = "no journal is in it"
    else:
        found = "it is no ordinary file" if path.exists() else why_not_there(path)
    raise ConfigurationError(
        f"nothing can be replayed from {path}: {found}; give a journal's directory, or JSON lines in UTF-8"
    )


def _why_no_json_lines(path: Path) -> str | None:
    """Say at once of a file that it is something else, where its beginning tells."""
    try:
        require_readable(path)
        with path.open("rb") as file:
            begin = file.read(1 << 16)
            form = next((form for sign, form in _OTHER_FORMS.items() if begin.startswith(sign)), None)
            if form is not None or not begin.strip():
                return f"it is {form or 'empty'}"
            first = None
            if begin.lstrip().startswith(b"{"):  # else it may have no lines, and be too large to look for one
                file.seek(0)
                first = json.loads(next(line for line in file if line.strip()))
    except OSError as error:
        return str(error.strerror)
    except (ValueError, RecursionError):
        first = None
    return None if isinstance(first, dict) else "its first line is no JSON object"

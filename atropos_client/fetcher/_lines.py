"""JSON lines between the two processes: writing, reading, and errors that keep their class on the way."""

from __future__ import annotations

import base64
import json
import logging
import os
import select
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from atropos_client import errors
from atropos_client.errors import AtroposClientError, BatchNotRecorded, ErrorStatus, FetcherDied
from schemas import printable

Message = dict[str, Any]

_CHUNK = 1 << 16
_LARGEST_ORPHAN_LOG = 1 << 20  # bytes; the one before it is kept too


class LineWriter:
    """Writes messages to a pipe; threads may share it."""

    def __init__(self, descriptor: int) -> None:
        """Write to this descriptor, which stays the caller's."""
        self._descriptor = descriptor
        self._guard = threading.Lock()

    def send(self, message: Message | bytes) -> bool:
        """Write one message. False: nobody reads the other end any more."""
        line = message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n"
        view = memoryview(line)
        with self._guard:
            try:
                while view:
                    view = view[os.write(self._descriptor, view) :]
            except BrokenPipeError:
                return False
        return True


class LineReader:
    """Reads messages from a pipe without blocking longer than asked."""

    def __init__(self, descriptor: int) -> None:
        """Read from this descriptor, which stays the caller's."""
        self._descriptor = descriptor
        self._pieces: list[bytes] = []

    def read(self, seconds: float) -> list[bytes] | None:
        """Wait up to `seconds` and return the whole lines that came, without line ends.

        None: the other end was closed.
        """
        if not select.select([self._descriptor], [], [], seconds)[0]:
            return []
        chunk = os.read(self._descriptor, _CHUNK)
        if not chunk:
            return None
        *lines, rest = chunk.split(b"\n")
        if lines:
            lines[0] = b"".join([*self._pieces, lines[0]])
            self._pieces = []
        self._pieces.append(rest)
        return lines


def error_to_message(error: BaseException) -> Message:
    """Describe an error so that the other process can raise it again."""
    message: Message = {"class": type(error).__name__, "text": str(error.args[0]) if error.args else ""}
    if isinstance(error, AtroposClientError):
        message |= {"method": error.method, "url": error.url}
    else:
        message["text"] = f"{type(error).__name__}: {error}"
    if isinstance(error, ErrorStatus):
        message["status_code"] = error.status_code
    if isinstance(error, BatchNotRecorded):
        message["body"] = base64.b64encode(error.body).decode("ascii")
    return message


def error_from_message(message: Message) -> AtroposClientError:
    """Make the error that `error_to_message` described; one that is not of our tree becomes FetcherDied."""
    kind = getattr(errors, message["class"], None)
    if not (isinstance(kind, type) and issubclass(kind, AtroposClientError)):
        return FetcherDied(f"the fetching process failed: {message['text']}")
    more: Message = {}
    if issubclass(kind, ErrorStatus):
        more["status_code"] = message["status_code"]
    if issubclass(kind, BatchNotRecorded):
        more["body"] = base64.b64decode(message["body"])
    return kind(message["text"], method=message["method"], url=message["url"], **more)


class LogSender(logging.Handler):
    """Sends log records to the other process, which logs them as its own; to a file when it is gone."""

    def __init__(self, writer: LineWriter, orphan_log: Path) -> None:
        """Send through this writer. `orphan_log`: made when there is something to say and nobody to hear."""
        super().__init__()
        self._writer = writer
        self._orphan_log = orphan_log

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record, or append it to the file."""
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        if self._writer.send({"level": record.levelno, "logger": record.name, "text": text}):
            return
        try:
            self._orphan_log.touch(mode=0o600)
            if self._orphan_log.stat().st_size > _LARGEST_ORPHAN_LOG:
                self._orphan_log.replace(self._orphan_log.with_name(self._orphan_log.name + ".1"))
                self._orphan_log.touch(mode=0o600)
            with self._orphan_log.open("a", encoding="utf-8") as file:
                line = printable(text, lines=True)
                file.write(f"{datetime.now(tz=UTC).isoformat()} {record.levelname} {line}\n")
        except OSError:
            self.handleError(record)


def log_received(lines: list[bytes], logger: logging.Logger) -> Iterator[str]:
    """Log lines that a `LogSender` sent, and all else as a warning of `logger`; yields their texts."""
    for line in lines:
        try:
            message = json.loads(line)
            level, name, text = int(message["level"]), str(message["logger"]), str(message["text"])
        except (ValueError, TypeError, KeyError):  # a traceback, or a library that writes to stderr
            level, name, text = logging.WARNING, logger.name, line.decode(errors="replace")
        logging.getLogger(name).log(level, "%s", text)
        yield text

"""Tells the trainer why its fetching process ended: one line of JSON, from which the error is made again."""

from __future__ import annotations

import json
from typing import Any

from atropos_client import errors
from atropos_client.errors import AtroposClientError, ErrorStatus, FetcherDied


def write_last_words(error: BaseException) -> bytes:
    """Describe an error so that the other process can raise it."""
    words: dict[str, Any] = {"class": type(error).__name__}
    if isinstance(error, AtroposClientError):
        words |= {"text": str(error.args[0]) if error.args else "", "method": error.method, "url": error.url}
    else:
        words["text"] = f"{type(error).__name__}: {error}"
    if isinstance(error, ErrorStatus):
        words["status_code"] = error.status_code
    return json.dumps(words).encode() + b"\n"


def read_last_words(line: bytes) -> AtroposClientError:
    """Make the error that `write_last_words` described; one that is not of our tree becomes FetcherDied."""
    words = json.loads(line)
    kind = getattr(errors, words.pop("class"), None)
    text = words.pop("text")
    if not (isinstance(kind, type) and issubclass(kind, AtroposClientError)):
        return FetcherDied(f"the fetching process failed: {text}")
    return kind(text, **words)

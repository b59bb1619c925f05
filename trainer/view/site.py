"""Answers the requests of the page: its own files, and what a run's directory says, as JSON.

A path of a request is looked up in tables; it never becomes the name of a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from http import HTTPStatus
from importlib.resources import files
from typing import Any, Final
from urllib.parse import parse_qs

from trainer.monitoring.server import PageReply
from trainer.view.rollouts import MOST_TOKENS
from trainer.view.run_reader import OUTCOMES, POINTS, NotThere, RunReader

SCRIPTS: Final = (
    "vendor/uPlot.iife.min.js",
    "format.js",
    "source.js",
    "charts.js",
    "overview.js",
    "tokens.js",
    "rollouts.js",
    "app.js",
)
"""In the order in which they run; the browser gets one file, as each further one is a connection more."""
STYLES: Final = ("vendor/uPlot.min.css", "page.css")

_HEADERS: Final = (
    (
        "Content-Security-Policy",
        (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
    ),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
)
_LARGEST_NUMBER: Final = 10**15


def read_asset(name: str) -> str:
    """Read a file of the page."""
    return (files("trainer.view") / "page" / name).read_text(encoding="utf-8")


def joined(names: Sequence[str]) -> str:
    """Put files of the page one after another."""
    return "\n".join(read_asset(name) for name in names)


class Query:
    """The words of a query, each checked.

    Args:
        text: What stands behind the question mark.
    """

    def __init__(self, text: str) -> None:
        self._words = {name: values[-1] for name, values in parse_qs(text, max_num_fields=32).items()}

    def number(self, name: str, default: int | None = None) -> int | None:
        """A whole number.

        Raises:
            ValueError: It is none.
        """
        word = self._words.get(name)
        if word is None:
            return default
        if not word.isascii() or not word.isdigit() or int(word[:20]) > _LARGEST_NUMBER:
            raise ValueError(f"{name} must be a whole number of 0 or more")
        return int(word[:20])

    def text(self, name: str, default: str = "") -> str:
        """A word."""
        return self._words.get(name, default)


class RunSite:
    """The page of one run, or of several over one another.

    Args:
        readers: The runs; the first is the one whose rollouts and state are shown.
        live: The page lies on the trainer's own port, so that /health is there too.
    """

    def __init__(self, readers: Sequence[RunReader], *, live: bool = False) -> None:
        self._readers = list(readers)
        self._live = live
        self._files = {
            "/": ("text/html; charset=utf-8", read_asset("index.html")),
            "/assets/page.js": ("text/javascript; charset=utf-8", joined(SCRIPTS)),
            "/assets/page.css": ("text/css; charset=utf-8", joined(STYLES)),
        }
        self._routes: dict[str, Callable[[RunReader, Query], Any]] = {
            "/api/state": self._state,
            "/api/curves": _curves,
            "/api/batches": _batches,
            "/api/group": _group,
        }

    def answer(self, path: str, query: str) -> PageReply:
        """Answer a request."""
        if path in self._files:
            content_type, text = self._files[path]
            return PageReply(HTTPStatus.OK, content_type, text.encode(), _HEADERS)
        route = self._routes.get(path)
        if route is None:
            return _json(HTTPStatus.NOT_FOUND, {"error": "there is no such page"})
        try:
            words = Query(query)
            return _json(HTTPStatus.OK, route(self._reader(words.number("run", 0) or 0), words))
        except NotThere as error:
            return _json(HTTPStatus.NOT_FOUND, {"error": str(error)})
        except ValueError as error:
            return _json(HTTPStatus.BAD_REQUEST, {"error": str(error)})

    def _reader(self, run: int) -> RunReader:
        if run >= len(self._readers):
            raise NotThere(f"the number of runs here is {len(self._readers)}")
        return self._readers[run]

    def _state(self, reader: RunReader, words: Query) -> dict[str, Any]:
        del words
        return {
            **reader.state(),
            "runs": [each.directory.absolute().name for each in self._readers],
            "live": self._live,
        }


def _curves(reader: RunReader, words: Query) -> dict[str, Any]:
    known = words.number("known")
    reader.metrics.read_new()
    if known is not None and known == reader.metrics.position:
        return {"unchanged": True, "position": known}
    names = [name for name in words.text("columns").split(",") if name]
    return reader.curves(
        words.text("kind", "step"),
        names,
        first=words.number("first"),
        last=words.number("last"),
        points=words.number("points", POINTS) or POINTS,
    )


def _batches(reader: RunReader, words: Query) -> dict[str, Any]:
    outcome: Any = words.text("outcome") or None
    if outcome is not None and outcome not in OUTCOMES:
        raise ValueError(f"outcome must be one of {', '.join(OUTCOMES)}")
    return reader.batches(
        before=words.number("before"), limit=words.number("limit", 30) or 30, outcome=outcome
    )


def _group(reader: RunReader, words: Query) -> dict[str, Any]:
    return reader.group(
        words.number("batch", 0) or 0,
        words.number("group", 0) or 0,
        most_tokens=words.number("tokens", MOST_TOKENS) or MOST_TOKENS,
    )


def _json(status: HTTPStatus, value: Any) -> PageReply:
    body = json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    return PageReply(status, "application/json", body, _HEADERS)

"""A proxy on loopback that spoils a share of the requests, and keeps count of what it did to which batch."""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import httpx

BEFORE = ("500", "429", "reset")
"""The request does not reach the server."""
AFTER = ("cut", "garbled", "late")
"""The server has answered; what it said does not arrive, or late."""

_PATIENCE = 120.0
_LATE_SECONDS = 0.3
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host", "accept-encoding"}
_GARBLED = b'{"batch": [{"tokens": [[1, 2'


class FaultyProxy:
    """Stands between the trainer and one server. Use as a context manager.

    Args:
        target: Base URL of the server, which may come and go.
        share: Of the requests, how many are spoiled.
        seed: Of the faults.
    """

    def __init__(self, target: str, *, share: float, seed: int) -> None:
        self._target = target
        self._share = share
        self._generator = random.Random(seed)
        self._lock = threading.Lock()
        self.requests = 0
        self.faults: Counter[str] = Counter()
        """By kind; `down`: the server was not there, or died in the middle."""
        self.polls: Counter[str] = Counter()
        """What became of GET /batch: `delivered`, `cut`, `garbled` (a batch of the API's each), `nothing`
        (there was none), `nothing cut`, `nothing garbled`, `down`, `500`, `429`, `reset`."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="faulty-proxy")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _draw(self) -> str | None:
        with self._lock:
            self.requests += 1
            if self._generator.random() >= self._share:
                return None
            return self._generator.choice(BEFORE + AFTER)

    def _count(self, path: str, fault: str | None, body: bytes | None) -> None:
        with self._lock:
            if fault is not None:
                self.faults[fault] += 1
            if path == "/batch":
                self.polls[_fate(fault, body)] += 1

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = _PATIENCE

            def do_GET(self) -> None:
                proxy._serve(self)

            do_POST = do_GET  # noqa: N815 - the standard library's name

            def log_message(self, *_: Any) -> None:
                """Be silent."""

        return Handler

    def _serve(self, request: BaseHTTPRequestHandler) -> None:
        sent = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        path = request.path.partition("?")[0]
        fault = self._draw()
        if fault in BEFORE:
            self._count(path, fault, None)
            _BEFORE[fault](request)
            return
        try:
            reply = self._forward(request, sent)
        except httpx.HTTPError:
            self._count(path, "down", None)
            _reset(request)
            return
        self._count(path, fault, reply.content)
        if fault == "late":
            time.sleep(_LATE_SECONDS)
        if fault == "garbled":
            _answer(request, 200, _GARBLED)
        elif fault == "cut":
            _answer(request, reply.status_code, reply.content, cut=True)
        else:
            kind = reply.headers.get("content-type", "application/json")
            _answer(request, reply.status_code, reply.content, content_type=kind)

    def _forward(self, request: BaseHTTPRequestHandler, sent: bytes) -> httpx.Response:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        return httpx.request(
            request.command,
            self._target + request.path,
            content=sent or None,
            headers=headers,
            timeout=_PATIENCE,
            trust_env=False,
        )


def _fate(fault: str | None, body: bytes | None) -> str:
    if body is None:
        return str(fault)
    holds_batch = bool(json.loads(body).get("batch")) if body.startswith(b"{") else False
    if fault in ("cut", "garbled"):
        return fault if holds_batch else f"nothing {fault}"
    return "delivered" if holds_batch else "nothing"


def _answer(
    request: BaseHTTPRequestHandler,
    status: int,
    body: bytes,
    *,
    content_type: str = "application/json",
    cut: bool = False,
    headers: dict[str, str] | None = None,
) -> None:
    try:
        request.send_response(status)
        request.send_header("Content-Type", content_type)
        request.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body[: len(body) // 2] if cut else body)
        request.close_connection = request.close_connection or cut
    except OSError:  # the trainer has gone
        request.close_connection = True


def _reset(request: BaseHTTPRequestHandler) -> None:
    request.close_connection = True
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.connection.close()


_BEFORE: dict[str | None, Callable[[BaseHTTPRequestHandler], None]] = {
    "500": lambda request: _answer(request, 500, b'{"detail": "Internal Server Error"}'),
    "429": lambda request: _answer(request, 429, b'{"detail": "slow down"}', headers={"Retry-After": "0"}),
    "reset": _reset,
}

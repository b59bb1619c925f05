"""A reverse proxy on loopback that spoils a share of the requests, and writes down what it did to each.

What a request suffers is drawn from a seed and the request's number. Everything else is passed on unchanged,
so that what the proxy has seen is what the two parties have said to each other.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import json
import random
import socket
import struct
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Self
from urllib.parse import urlsplit

from tests.soak.identity import names_of

BEFORE: Final = ("500", "429", "reset")
"""Faults that keep a request from its server."""

AFTER: Final = ("cut", "garbage")
"""Faults that spoil the server's reply."""

KINDS: Final = (*BEFORE, *AFTER, "delay")

UPSTREAM_PATIENCE: Final = 120.0
"""Seconds; only ends a hang."""

_HOP_HEADERS: Final = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


@dataclass(frozen=True)
class Passage:
    """One request, and what became of it."""

    path: str
    fault: str | None
    """What the proxy did to it: one of `KINDS`. None: nothing."""
    status: int | None
    """What the server answered. None: it was not asked, or did not answer in full."""
    batch: str | None = None
    """SHA-256 of the batch that the server handed out with its reply, if it did."""
    groups: tuple[str, ...] = ()
    """Names of the groups in it."""
    garbage: str | None = None
    """SHA-256 of what was sent in place of the reply, if something was."""

    @property
    def broken_by_the_server(self) -> bool:
        """Whether the server itself answered that it failed."""
        return self.status is not None and self.status >= 500

    @property
    def took_a_batch(self) -> bool:
        """Whether the server had a batch less afterwards: given away, or lost in a failed answer."""
        return self.batch is not None or (self.path == "/batch" and self.broken_by_the_server)

    @property
    def spoilt(self) -> bool:
        """Whether the client got no usable reply although its request may have had an effect."""
        if self.fault == "429":  # says that nothing was done
            return False
        return self.fault in ("500", "reset", *AFTER) or self.status is None or self.status >= 500


@dataclass(frozen=True)
class _Reply:
    status: int
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def plain(self) -> bytes:
        """The body, decompressed."""
        return gzip.decompress(self.body) if ("content-encoding", "gzip") in self.headers else self.body


class FaultyProxy:
    """Stands before `upstream`; use it as a context manager. Spoils nothing before `arm`."""

    def __init__(self, upstream: str, *, share: float, seed: str) -> None:
        self._address = urlsplit(upstream).netloc
        self._share = share
        self._seed = seed
        self._armed = threading.Event()
        self._lock = threading.Lock()
        self._requests = 0
        self._taken = 0
        self._under_way = 0
        self._passages: list[Passage] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self._http.block_on_close = False
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def arm(self) -> None:
        """Spoil requests from now on."""
        self._armed.set()

    def passages(self, path: str | None = None) -> list[Passage]:
        """What has been seen so far."""
        with self._lock:
            return [each for each in self._passages if path in (None, each.path)]

    @property
    def taken(self) -> int:
        """How many batches the server has given away, or broken in the attempt, so far."""
        return self._taken

    @property
    def idle(self) -> bool:
        """Whether no request is under way: all that came is among the passages."""
        return self._under_way == 0

    def come(self, change: int) -> None:
        """A request came (1), or has been dealt with (-1)."""
        with self._lock:
            self._under_way += change

    def draw(self) -> tuple[int, str | None]:
        """The number of the next request, and what is to happen to it."""
        with self._lock:
            self._requests += 1
            number = self._requests
        generator = random.Random(f"{self._seed} {number}")
        if not self._armed.is_set() or generator.random() >= self._share:
            return number, None
        return number, generator.choice(KINDS)

    def ask(self, method: str, path: str, headers: dict[str, str], body: bytes) -> _Reply | None:
        """Ask the server; None if its reply did not come in full.

        Raises:
            ConnectionRefusedError: It is down.
        """
        connection = http.client.HTTPConnection(self._address, timeout=UPSTREAM_PATIENCE)
        try:
            connection.connect()
            try:
                connection.request(method, path, body or None, headers)
                response = connection.getresponse()
                kept = [(name.lower(), value) for name, value in response.getheaders()]
                return _Reply(
                    response.status,
                    [(name, value) for name, value in kept if name not in _HOP_HEADERS],
                    response.read(),
                )
            except (http.client.HTTPException, OSError):
                return None
        finally:
            connection.close()

    def note(self, passage: Passage) -> None:
        with self._lock:
            self._passages.append(passage)
            self._taken += passage.took_a_batch

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def _handler(proxy: FaultyProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            proxy.come(1)
            try:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self._pass(*proxy.draw(), body)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client is gone
            finally:
                proxy.come(-1)

        def do_POST(self) -> None:
            self.do_GET()

        def _pass(self, number: int, fault: str | None, body: bytes) -> None:
            path = self.path.split("?")[0]
            if fault in BEFORE:
                proxy.note(Passage(path, fault, None))
                return self._turn_away(fault)
            if fault == "delay":
                time.sleep(0.05 + 0.4 * random.Random(number).random())
            headers = {
                name: value for name, value in self.headers.items() if name.lower() not in _HOP_HEADERS
            }
            try:
                reply = proxy.ask(self.command, self.path, headers, body)
            except OSError:
                proxy.note(Passage(path, "delay" if fault == "delay" else None, None))
                return self._send(502, [], b"no server behind this proxy")
            if reply is None:
                proxy.note(Passage(path, "delay" if fault == "delay" else None, None))
                return self._reset()
            batch, groups = _handed_out(path, reply)
            if fault == "garbage":
                garbage = b'{"batch": [{"tokens": \xff\xfe number %d' % number
                checksum = hashlib.sha256(garbage).hexdigest()
                proxy.note(Passage(path, fault, reply.status, batch, groups, checksum))
                return self._send(200, [("content-type", "application/json")], garbage)
            proxy.note(Passage(path, fault, reply.status, batch, groups))
            return self._send(reply.status, reply.headers, reply.body, cut=fault == "cut")

        def _turn_away(self, fault: str | None) -> None:
            if fault == "reset":
                self._reset()
            elif fault == "429":
                self._send(429, [("retry-after", "1")], b"later")
            else:
                self._send(500, [], b"out of order")

        def _reset(self) -> None:
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

        def _send(
            self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut: bool = False
        ) -> None:
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            # What is empty can only be cut by announcing more than comes.
            self.send_header("Content-Length", str(len(body) + int(cut and not body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if cut else body)
            if cut:
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            pass

    return Handler


def _handed_out(path: str, reply: _Reply) -> tuple[str | None, tuple[str, ...]]:
    if path != "/batch" or reply.status != 200:
        return None, ()
    plain = reply.plain
    batch = json.loads(plain).get("batch")
    return (hashlib.sha256(plain).hexdigest(), names_of(batch)) if batch else (None, ())

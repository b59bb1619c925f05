"""A real HTTP server in a thread that answers exactly what a test tells it to, good or bad."""

from __future__ import annotations

import gzip
import socket
import struct
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One reply, and the ways in which it goes wrong."""

    body: bytes = b"{}"
    status: int = 200
    content_type: str | None = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    """Seconds before anything is sent."""
    cut_at: int | None = None
    """Send only so many bytes of the announced length, then close."""
    drip: float = 0.0
    """Seconds between two bytes."""
    hang_up: bool = False
    """Close without any reply."""
    announce_length: bool = True
    """False: a body that ends with the connection."""
    repeat: int = 1
    """How often the body is sent, without holding it in memory so often; the length is not announced."""
    raw: bytes | None = None
    """Exactly these bytes in place of an HTTP reply, then close."""
    reset: bool = False
    """Close with a TCP reset instead of in order."""


def zipped(body: bytes, **more: Any) -> Answer:
    """Return an answer whose body travels as gzip."""
    return Answer(body=gzip.compress(body), headers={"Content-Encoding": "gzip"}, **more)


@dataclass(frozen=True)
class Seen:
    """One request as it arrived; the body is decompressed."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    client_port: int


class MisbehavingServer:
    """Scripted per path; the last answer of a script repeats. Use as a context manager."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self._scripts: dict[str, list[Answer]] = defaultdict(lambda: [Answer(status=404, body=b"no script")])
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        # Handlers may sleep on purpose; closing must not wait for them.
        self._http.block_on_close = False
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def script(self, path: str, *answers: Answer) -> None:
        with self._lock:
            self._scripts[path] = list(answers)

    def paths(self, wanted: str | None = None) -> list[str]:
        with self._lock:
            return [seen.path for seen in self.seen if wanted in (None, seen.path)]

    def wait(self, seconds: float) -> None:
        """Sleep inside a handler, but not beyond the end of the test."""
        self._released.wait(seconds)

    def release(self) -> None:
        """End every delay, now and from now on."""
        self._released.set()

    def answer_for(self, seen: Seen) -> Answer:
        with self._lock:
            self.seen.append(seen)
            script = self._scripts[seen.path]
            return script.pop(0) if len(script) > 1 else script[0]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def _handler(server: MisbehavingServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            headers = {name.lower(): value for name, value in self.headers.items()}
            answer = server.answer_for(Seen(self.command, self.path, headers, body, self.client_address[1]))
            try:
                self._play(answer)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client had enough, which is what some tests are about

        def do_POST(self) -> None:
            self.do_GET()

        def _play(self, answer: Answer) -> None:
            server.wait(answer.delay) if answer.delay else None
            if answer.hang_up:
                self.close_connection = True
                return
            if answer.raw is not None or answer.reset:
                self.wfile.write(answer.raw or b"")
                self.close_connection = True
                if answer.reset:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                return
            self.send_response(answer.status)
            if answer.content_type is not None:
                self.send_header("Content-Type", answer.content_type)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if answer.announce_length and answer.repeat == 1:
                self.send_header("Content-Length", str(len(answer.body)))
            else:
                self.send_header("Connection", "close")
            self.end_headers()
            body = answer.body if answer.cut_at is None else answer.body[: answer.cut_at]
            if answer.drip:
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    server.wait(answer.drip)
            else:
                for _ in range(answer.repeat):
                    self.wfile.write(body)
            self.close_connection = (
                answer.cut_at is not None or not answer.announce_length or answer.repeat > 1
            )

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            pass

    return Handler


def eventually(condition: Any, seconds: float = 60.0) -> None:
    """Wait until a condition holds; fail if it never does. The bound is generous: it only ends a hang."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never became true"
        time.sleep(0.005)

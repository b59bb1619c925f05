"""Gives published files to servers on other machines: `GET /v000003.delta.safetensors`, with the token.

Nothing else is answered, and nobody can hold it up for long: each connection has a thread, of which there are
a few, and a time limit for every read and write.
"""

from __future__ import annotations

import hmac
import os
import re
import shutil
import socket
import threading
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from trainer.errors import ConfigurationError

_NAME = re.compile(r"/(v\d{6,}\.(?:delta|whole)\.safetensors)")
_SECONDS = 30.0
"""For one read or write; a file takes as long as it takes."""
MAX_CONNECTIONS = 64
"""At once; more are closed at once, and the servers ask again."""


class FileServer:
    """Serves the published files of a directory until it is closed.

    Args:
        host: Address to listen on.
        port: Port to listen on; 0: any free one.
        directory: Where the files are.
        token: What callers have to present as bearer token.

    Raises:
        ConfigurationError: It cannot listen there.
    """

    def __init__(self, host: str, port: int, directory: Path, token: str) -> None:
        try:
            handler = partial(_Handler, directory=directory, token=token)
            self._server = _Server((host, port), handler)
        except OSError as error:
            raise ConfigurationError(
                f"publish.delta.port: cannot listen on {host}:{port} ({error.strerror or error}); choose "
                "another publish.delta.port"
            ) from error
        self.port = int(self._server.server_address[1])
        """The port that it listens on."""
        self._thread = threading.Thread(target=self._server.serve_forever, name="delta-files", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening; what is under way is not waited for."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], handler: Any) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of who has gone in the middle."""


class _Handler(BaseHTTPRequestHandler):
    timeout = _SECONDS

    def __init__(self, *arguments: Any, directory: Path, token: str) -> None:
        self._directory = directory
        self._token = token
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """Send the file that is named, whole."""
        given = self.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            self._refuse(HTTPStatus.UNAUTHORIZED)
            return
        name = _NAME.fullmatch(self.path)
        if name is None:
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.fdopen(os.open(self._directory / name[1], flags), "rb")
        except OSError:
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        with file:
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(os.fstat(file.fileno()).st_size))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            shutil.copyfileobj(file, self.wfile, 1 << 20)

    def _refuse(self, status: HTTPStatus) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""

    def version_string(self) -> str:
        """Tell nothing of what answers."""
        return "trainer"

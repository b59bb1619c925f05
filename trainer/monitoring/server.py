"""A small HTTP server for reports: GET only, one thread, nobody can hold it up.

One event loop serves all connections. A connection has a few seconds for its whole life, a request a few KiB,
and when there are too many connections the oldest is closed for the newest. What takes longer to make, a page
of the run, is made in a thread of its own: reports never wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Final, NamedTuple, Self

from trainer.errors import ConfigurationError

logger = logging.getLogger(__name__)

CONNECTION_SECONDS: Final = 5.0
"""For a connection, from its first byte to its last."""
SITE_SECONDS: Final = 60.0
"""The same where the site answers."""
SITE_IDLE_SECONDS: Final = 20.0
"""The same where there is a site, before it is asked: browsers open connections ahead of their requests."""
MAX_CONNECTIONS: Final = 32
"""At once; one more closes the oldest."""
MAX_REQUEST_BYTES: Final = 8192
"""For the request line and all headers."""

_JOIN_SECONDS: Final = 5.0


class PageReply(NamedTuple):
    """The answer of a page."""

    status: HTTPStatus
    content_type: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()
    """Further ones; what they hold is ours."""


class PageRequest(NamedTuple):
    """A GET request."""

    path: str
    query: str
    headers: Mapping[str, str]
    """By name in lower case; of several of a name the last."""


Site = Callable[[PageRequest], PageReply]
"""Answers what is no page; in one thread of its own, so that it may take its time."""


class HealthServer:
    """Serves pages until it is closed; a context manager.

    Args:
        host: Address to listen on.
        port: Port to listen on; 0: any free one.
        pages: By path, what makes the reply; called in the server's thread, so it must not wait for anybody.
        site: Answers every other path. None: there is nothing there.
        setting: Names the port in messages.

    Raises:
        ConfigurationError: It cannot listen there.
    """

    def __init__(
        self,
        host: str,
        port: int,
        pages: Mapping[str, Callable[[], PageReply]],
        *,
        site: Site | None = None,
        setting: str = "health.port",
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family)
        except OSError as error:
            raise ConfigurationError(
                f"{setting}: cannot listen on {host}:{port} ({error.strerror or error}); choose another "
                f"{setting}, or 0 for any free one"
            ) from error
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._listener.getsockname()[1]}"
        """Its base URL."""
        self._pages = dict(pages)
        self._site = site
        self._site_thread = ThreadPoolExecutor(1, thread_name_prefix="view")
        self._connections: dict[asyncio.Task[None], None] = {}  # oldest first
        self._closing = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(_JOIN_SECONDS)
        self._site_thread.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        assert self._loop is not None  # noqa: S101 - for the type checker
        try:
            self._loop.run_until_complete(self._serve_until_closed())
        except Exception:
            logger.exception("The health server has ended")
        finally:
            self._loop.close()

    async def _serve_until_closed(self) -> None:
        accepting = asyncio.ensure_future(self._accept_all())
        await self._closing.wait()
        left = [accepting, *self._connections]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        self._listener.close()

    async def _accept_all(self) -> None:
        """Accept one connection after the other, so that there are never more than the bound."""
        loop = asyncio.get_running_loop()
        self._listener.setblocking(False)
        while True:
            while len(self._connections) >= MAX_CONNECTIONS:
                oldest = next(iter(self._connections))
                oldest.cancel()
                await asyncio.wait([oldest])
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError:  # no descriptor is left: others took them
                await asyncio.sleep(1.0)
                continue
            task = loop.create_task(self._serve(connection))
            self._connections[task] = None
            task.add_done_callback(lambda done: self._connections.pop(done, None))

    async def _serve(self, connection: socket.socket) -> None:
        try:
            reader, writer = await asyncio.open_connection(sock=connection, limit=MAX_REQUEST_BYTES)
        except BaseException:
            connection.close()
            raise
        try:
            patience = CONNECTION_SECONDS if self._site is None else SITE_IDLE_SECONDS
            async with asyncio.timeout(patience) as deadline:
                try:
                    reply = await self._answer(await reader.readuntil(b"\r\n\r\n"), deadline)
                except asyncio.LimitOverrunError:
                    reply = _refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
                writer.write(_encode(reply))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            return  # they have gone, or took too long
        finally:
            writer.transport.abort()

    async def _answer(self, head: bytes, deadline: asyncio.Timeout) -> PageReply:
        words = head.partition(b"\r\n")[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _refusal(HTTPStatus.BAD_REQUEST)
        path, _, query = words[1].decode("latin-1").partition("?")
        page = self._pages.get(path)
        if page is None and self._site is None:
            return _refusal(HTTPStatus.NOT_FOUND)
        if words[0] != b"GET":
            return _refusal(HTTPStatus.METHOD_NOT_ALLOWED)
        try:
            if page is not None:
                return page()
            assert self._site is not None  # noqa: S101 - for the type checker
            loop = asyncio.get_running_loop()
            deadline.reschedule(loop.time() + SITE_SECONDS)
            request = PageRequest(path, query, _headers_of(head))
            return await loop.run_in_executor(self._site_thread, self._site, request)
        except Exception:
            logger.exception("A report could not be made")
            return _refusal(HTTPStatus.INTERNAL_SERVER_ERROR)


def _headers_of(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    pairs = (line.partition(":") for line in lines if line)
    return {name.lower(): value.strip() for name, _, value in pairs}


def _refusal(status: HTTPStatus) -> PageReply:
    return PageReply(status, "text/plain; charset=utf-8", f"{status.value} {status.phrase}\n".encode())


def _encode(reply: PageReply) -> bytes:
    allow = "Allow: GET\r\n" if reply.status is HTTPStatus.METHOD_NOT_ALLOWED else ""
    further = "".join(f"{name}: {value}\r\n" for name, value in reply.headers)
    head = (
        f"HTTP/1.1 {reply.status.value} {reply.status.phrase}\r\n"
        f"Content-Type: {reply.content_type}\r\nContent-Length: {len(reply.body)}\r\n"
        "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n"
        f"{allow}{further}Connection: close\r\n\r\n"
    )
    return head.encode() + reply.body

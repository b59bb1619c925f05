"""Running the application: one process, loopback unless told otherwise, a quick end on the first signal."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from local_stack.inference.engine import Engine

_log = logging.getLogger(__name__)

_KEEP_ALIVE = 75
"""Seconds: longer than a client's pause between two calls, so that it seldom meets a closing connection."""
_GRACE = 5
"""Seconds for replies under way after the engine has ended all requests."""


class InferenceServer(uvicorn.Server):
    """A uvicorn server that ends its engine's requests first when it is told to stop.

    Args:
        app: The application over `engine`.
        engine: Its engine.
        host: Address to listen on.
        port: Port to listen on; 0 for any free one.
    """

    def __init__(self, app: FastAPI, engine: Engine, *, host: str, port: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                access_log=False,
                log_config=None,
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=_GRACE,
            )
        )
        self._engine = engine

    def stop(self) -> None:
        """End the requests in flight with what they have, then the server. From any thread."""
        self._engine.stop()
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop on a signal; a second one does not wait for replies."""
        self._engine.stop()
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM without raising them again afterwards: stopping is no failure."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {
            number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

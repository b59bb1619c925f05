"""The HTTP application over one engine: its life, its errors in vLLM's shape, and running it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from http import HTTPStatus

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from local_stack.inference.engine import Engine
from local_stack.inference.errors import InferenceError, validation_message
from local_stack.inference.routes import make_routes
from schemas.inference import ErrorInfo, ErrorReply

_log = logging.getLogger(__name__)

_KEEP_ALIVE = 75
"""Seconds: longer than a client's pause between two calls, so that it seldom meets a closing connection."""
_GRACE = 5
"""Seconds for replies under way after the engine has ended all requests."""


def create_app(engine: Engine, *, model_name: str) -> FastAPI:
    """Make the application; it runs the engine from its start to its end.

    Args:
        engine: The engine.
        model_name: The name that requests have to use.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(engine.run())
        yield
        await engine.stop()
        await running

    app = FastAPI(title="atropos-trainer embedded inference server", lifespan=lifespan)
    app.include_router(make_routes(engine, model_name))
    for kind in (InferenceError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)
    return app


async def _on_error(_: Request, error: Exception) -> Response:
    """Answer in the shape of vLLM's errors."""
    parameter = None
    if isinstance(error, InferenceError):
        message, status, kind, parameter = str(error), error.status, error.kind, error.parameter
    elif isinstance(error, HTTPException):
        status = error.status_code
        message, kind = str(error.detail), HTTPStatus(status).phrase
    elif isinstance(error, RequestValidationError):
        status, kind = 400, "Bad Request"
        details = error.errors()
        message = validation_message(details)
        parameter = str(details[0]["loc"][-1]) if len(details[0]["loc"]) == 2 else None
    else:
        _log.error("a request failed unexpectedly", exc_info=error)
        message, status, kind = f"{type(error).__name__}: {error}", 500, "InternalServerError"
    body = ErrorReply(error=ErrorInfo(message=message, type=kind, param=parameter, code=status))
    return JSONResponse(body.model_dump(), status_code=status)


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

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the engine's requests with what they have, before waiting for their replies."""
        await self._engine.stop()
        await super().shutdown(sockets)

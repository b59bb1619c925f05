"""The HTTP application: routes of vLLM 0.32 and Atropos's `/generate`, over one engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from local_stack.inference.control_routes import control_routes
from local_stack.inference.engine import Engine
from local_stack.inference.errors import CheckpointMismatch, EngineFailure, RequestRefused
from local_stack.inference.generation_routes import generation_routes
from schemas.inference import ErrorInfo, ErrorReply

_log = logging.getLogger(__name__)

_MOST_ERRORS_REPORTED = 5
_STOP_TIMEOUT = 5.0
"""Seconds to wait for the engine's last step; a long prompt may take a few."""


def create_app(engine: Engine, *, model_name: str) -> FastAPI:
    """Make the application; it starts the engine when it starts and stops it when it ends.

    Args:
        engine: Not started yet.
        model_name: The name that requests have to use.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            engine.stop()
            await asyncio.to_thread(engine.join, _STOP_TIMEOUT)

    app = FastAPI(title="atropos-trainer embedded inference server", lifespan=lifespan)
    app.include_router(generation_routes(engine, model_name))
    app.include_router(control_routes(engine, model_name))
    app.add_exception_handler(RequestRefused, _on_refused)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(CheckpointMismatch, _on_mismatch)
    app.add_exception_handler(EngineFailure, _on_engine_failure)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_unexpected)
    return app


def _error(message: str, *, status: int, kind: str, parameter: str | None = None) -> JSONResponse:
    body: BaseModel = ErrorReply(error=ErrorInfo(message=message, type=kind, param=parameter, code=status))
    return JSONResponse(body.model_dump(), status_code=status)


async def _on_refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestRefused)  # noqa: S101 - what it is registered for
    return _error(str(error), status=error.status, kind=error.kind, parameter=error.parameter)


async def _on_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - what it is registered for
    details = error.errors()
    lines = [
        f"{'.'.join(str(part) for part in detail['loc'])}: {detail['msg']}"
        for detail in details[:_MOST_ERRORS_REPORTED]
    ]
    if len(details) > len(lines):
        lines.append(f"and {len(details) - len(lines)} more")
    return _error(
        f"{len(details)} validation error(s): " + "; ".join(lines),
        status=400,
        kind="Bad Request",
        parameter=str(details[0]["loc"][-1]) if details and len(details[0]["loc"]) == 2 else None,
    )


async def _on_mismatch(_: Request, error: Exception) -> Response:
    return _error(str(error), status=400, kind="BadRequestError", parameter="weights_path")


async def _on_engine_failure(_: Request, error: Exception) -> Response:
    return _error(str(error), status=500, kind="InternalServerError")


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - what it is registered for
    return _error(str(error.detail), status=error.status_code, kind=HTTPStatus(error.status_code).phrase)


async def _on_unexpected(_: Request, error: Exception) -> Response:
    _log.error("a request failed unexpectedly", exc_info=error)
    return _error(f"{type(error).__name__}: {error}", status=500, kind="InternalServerError")

"""The HTTP application over one engine, and running it.

The routes are those of vLLM 0.32 that environments, publishing and `check` use. Atropos's `/generate` is
answered as it is with vLLM: by the middleware of `inference_plugins`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Query
from fastapi import Request as Http
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from inference_plugins.atropos_generate import AtroposGenerate
from local_stack.inference.engine import Engine
from local_stack.inference.errors import (
    EngineFailure,
    InferenceError,
    RequestRefused,
    UnknownModel,
    validation_message,
)
from local_stack.inference.records import Request
from local_stack.inference.replies import chat_reply, completion_reply
from local_stack.inference.requests import completion_requests, render_chat
from schemas.inference import (
    CacheResetReply,
    ChatCompletionRequest,
    CollectiveRpcReply,
    CollectiveRpcRequest,
    CompletionRequest,
    ErrorInfo,
    ErrorReply,
    ModelCard,
    ModelList,
    PauseMode,
    PauseReply,
    PauseState,
    TokenizeReply,
    TokenizeRequest,
    WeightInfo,
    WeightVersionReply,
    WeightVersionRequest,
)

_log = logging.getLogger(__name__)

_KEEP_ALIVE = 75
"""Seconds: longer than a client's pause between two calls, so that it seldom meets a closing connection."""
_GRACE = 5
"""Seconds for replies under way after the engine has ended all requests."""


class InferenceServer(uvicorn.Server):
    """Serves one engine, which runs from its start to its end.

    Args:
        engine: The engine.
        model_name: The name that requests have to use.
        host: Address to listen on.
        port: Port to listen on; 0 for any free one.
    """

    def __init__(self, engine: Engine, *, model_name: str, host: str, port: int) -> None:
        app = FastAPI(title="atropos-trainer embedded inference server")
        _add_routes(app, engine, model_name)
        for kind in (InferenceError, RequestValidationError, HTTPException, Exception):
            app.add_exception_handler(kind, _on_error)
        super().__init__(
            uvicorn.Config(
                AtroposGenerate(app),
                host=host,
                port=port,
                access_log=False,
                log_config=None,
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=_GRACE,
            )
        )
        self._engine = engine

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the engine, then listen."""
        self._running = asyncio.create_task(self._engine.run())
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the engine's requests with what they have, before waiting for their replies."""
        await self._engine.stop()
        await self._running
        await super().shutdown(sockets)


def _add_routes(app: FastAPI, engine: Engine, model_name: str) -> None:
    card = ModelCard(id=model_name, root=engine.settings.model, max_model_len=engine.max_model_len)

    def check_model(asked: str | None) -> None:
        if asked not in (None, model_name):
            raise UnknownModel(
                f"The model `{asked}` does not exist. Valid aliases: {model_name}.", parameter="model"
            )

    # --- generating -------------------------------------------------------------------------------

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: Http) -> Response:
        check_model(body.model)
        requests = completion_requests(engine, body)
        await _generate(engine, requests, http)
        return _json(completion_reply(engine.codec, model_name, body, requests))

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, http: Http) -> dict[str, Any]:
        check_model(body.model)
        rendered = render_chat(engine, body)
        requests = completion_requests(engine, rendered)
        await _generate(engine, requests, http)
        return chat_reply(completion_reply(engine.codec, model_name, rendered, requests))

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> TokenizeReply:
        check_model(body.model)
        ids = engine.codec.encode(body.prompt)
        return TokenizeReply(count=len(ids), max_model_len=engine.max_model_len, tokens=ids)

    # --- state and weights ------------------------------------------------------------------------

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if engine.alive else 503)

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[card])

    @app.post("/pause")
    async def pause(mode: Annotated[PauseMode, Query()] = "abort") -> PauseReply:
        await engine.pause(mode)
        return PauseReply(status="paused")

    @app.post("/resume")
    async def resume() -> PauseReply:
        await engine.resume()
        return PauseReply(status="resumed")

    @app.get("/is_paused")
    async def is_paused() -> PauseState:
        return PauseState(is_paused=engine.paused)

    @app.post("/collective_rpc")
    async def collective_rpc(body: CollectiveRpcRequest) -> CollectiveRpcReply:
        """Load weights: the one method of vLLM's workers that is known here."""
        if body.method != "reload_weights":
            raise RequestRefused(
                f"method {body.method!r} is not supported; the embedded server knows `reload_weights`",
                parameter="method",
            )
        path = body.kwargs.get("weights_path", engine.settings.model)
        if body.args or set(body.kwargs) - {"weights_path"} or not isinstance(path, str):
            raise RequestRefused(
                "reload_weights takes the keyword argument `weights_path` only, a string", parameter="kwargs"
            )
        await engine.reload_weights(Path(path))
        return CollectiveRpcReply(results=[None])

    @app.post("/reset_prefix_cache")
    async def reset_prefix_cache(
        reset_running_requests: Annotated[bool, Query()] = False,
    ) -> CacheResetReply:
        # Nothing is cached between requests, so there is nothing to reset but what is running.
        if reset_running_requests:
            await engine.forget_keys()
        return CacheResetReply(success=True)

    @app.post("/update_weight_version")
    async def update_weight_version(body: WeightVersionRequest) -> WeightVersionReply:
        engine.weight_version = body.new_version
        return WeightVersionReply(success=True, new_version=body.new_version)

    @app.get("/weight_info")
    async def weight_info() -> WeightInfo:
        return WeightInfo(weight_version=engine.weight_version)


def _json(reply: BaseModel) -> Response:
    return Response(reply.model_dump_json(), media_type="application/json")


async def _generate(engine: Engine, requests: list[Request], http: Http) -> None:
    """Generate; if the client goes away meanwhile, stop."""
    work = asyncio.create_task(engine.generate(requests))
    # The request has been read in full before: the next message is that the client has gone.
    departure = asyncio.ensure_future(http.receive())
    departure.add_done_callback(lambda _: work.cancel())
    try:
        await work
    except asyncio.CancelledError as error:
        raise EngineFailure("the client has closed the connection") from error
    finally:
        departure.cancel()


async def _on_error(_: Http, error: Exception) -> Response:
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

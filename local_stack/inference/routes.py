"""The routes: vLLM 0.32's that environments, publishing and `check` use, and Atropos's `/generate`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi import Request as Http
from fastapi.responses import Response
from pydantic import BaseModel

from local_stack.inference.engine import Engine
from local_stack.inference.errors import EngineFailure, RequestRefused, UnknownModel
from local_stack.inference.records import Request
from local_stack.inference.replies import chat_reply, completion_reply, generate_reply
from local_stack.inference.requests import chat_request, completion_requests, generate_request
from schemas.inference import (
    CacheResetReply,
    ChatCompletionRequest,
    CollectiveRpcReply,
    CollectiveRpcRequest,
    CompletionRequest,
    GenerateRequest,
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


def make_routes(engine: Engine, model_name: str) -> APIRouter:
    """Make the routes over an engine that serves `model_name`."""
    router = APIRouter()
    card = ModelCard(id=model_name, root=engine.settings.model, max_model_len=engine.max_model_len)

    def check_model(asked: str | None) -> None:
        if asked not in (None, model_name):
            raise UnknownModel(
                f"The model `{asked}` does not exist. Valid aliases: {model_name}.", parameter="model"
            )

    # --- generating -------------------------------------------------------------------------------

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, http: Http) -> Response:
        check_model(body.model)
        requests = completion_requests(engine, body)
        await _generate(engine, requests, http)
        return _json(completion_reply(engine.codec, model_name, body, requests))

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, http: Http) -> Response:
        check_model(body.model)
        request = chat_request(engine, body)
        await _generate(engine, [request], http)
        return _json(chat_reply(model_name, request))

    @router.post("/generate")
    async def generate(body: GenerateRequest, http: Http) -> Response:
        request = generate_request(engine, body)
        await _generate(engine, [request], http)
        return _json(generate_reply(body, request))

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> TokenizeReply:
        check_model(body.model)
        ids = engine.codec.encode(body.prompt)
        return TokenizeReply(count=len(ids), max_model_len=engine.max_model_len, tokens=ids)

    # --- state and weights ------------------------------------------------------------------------

    @router.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if engine.alive else 503)

    @router.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[card])

    @router.post("/pause")
    async def pause(mode: Annotated[PauseMode, Query()] = "abort") -> PauseReply:
        await engine.pause(mode)
        return PauseReply(status="paused")

    @router.post("/resume")
    async def resume() -> PauseReply:
        await engine.resume()
        return PauseReply(status="resumed")

    @router.get("/is_paused")
    async def is_paused() -> PauseState:
        return PauseState(is_paused=engine.paused)

    @router.post("/collective_rpc")
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

    @router.post("/reset_prefix_cache")
    async def reset_prefix_cache(
        reset_running_requests: Annotated[bool, Query()] = False,
    ) -> CacheResetReply:
        # Nothing is cached between requests, so there is nothing to reset but what is running.
        if reset_running_requests:
            await engine.forget_keys()
        return CacheResetReply(success=True)

    @router.post("/update_weight_version")
    async def update_weight_version(body: WeightVersionRequest) -> WeightVersionReply:
        engine.weight_version = body.new_version
        return WeightVersionReply(success=True, new_version=body.new_version)

    @router.get("/weight_info")
    async def weight_info() -> WeightInfo:
        return WeightInfo(weight_version=engine.weight_version)

    return router


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

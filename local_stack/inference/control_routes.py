"""Routes about the server's state, and those with which a trainer changes weights."""

from __future__ import annotations

import asyncio
import importlib.metadata
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import Response

from local_stack.inference.engine import Engine
from local_stack.inference.errors import RequestRefused
from schemas.inference import (
    CacheResetReply,
    CollectiveRpcReply,
    CollectiveRpcRequest,
    ModelCard,
    ModelList,
    PauseMode,
    PauseReply,
    PauseState,
    ServerVersion,
    WeightInfo,
    WeightVersionReply,
    WeightVersionRequest,
)


def control_routes(engine: Engine, model_name: str) -> APIRouter:
    """Make the routes over an engine that serves `model_name`."""
    router = APIRouter()
    one_reload_at_a_time = asyncio.Lock()
    card = ModelCard(id=model_name, root=str(engine.model), max_model_len=engine.max_model_len)

    @router.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if engine.alive else 503)

    @router.get("/version")
    async def version() -> ServerVersion:
        return ServerVersion(version=f"atropos-trainer {importlib.metadata.version('atropos-trainer')}")

    @router.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[card])

    @router.post("/pause")
    async def pause(mode: Annotated[PauseMode, Query()] = "abort") -> PauseReply:
        await asyncio.wrap_future(engine.pause(mode))
        return PauseReply(status="paused")

    @router.post("/resume")
    async def resume() -> PauseReply:
        await asyncio.wrap_future(engine.resume())
        return PauseReply(status="resumed")

    @router.get("/is_paused")
    async def is_paused() -> PauseState:
        return PauseState(is_paused=engine.paused)

    @router.post("/collective_rpc")
    async def collective_rpc(body: CollectiveRpcRequest) -> CollectiveRpcReply:
        directory = _reload_directory(body, engine.model)
        async with one_reload_at_a_time:
            done = await asyncio.to_thread(engine.reload_weights, directory)
            await asyncio.wrap_future(done)
        return CollectiveRpcReply(results=[None])

    @router.post("/reset_prefix_cache")
    async def reset_prefix_cache(
        reset_running_requests: Annotated[bool, Query()] = False,
    ) -> CacheResetReply:
        # Nothing is cached between requests, so there is nothing to reset but what is running.
        if reset_running_requests:
            await asyncio.wrap_future(engine.forget_keys())
        return CacheResetReply(success=True)

    @router.post("/update_weight_version")
    async def update_weight_version(body: WeightVersionRequest) -> WeightVersionReply:
        await asyncio.wrap_future(engine.set_weight_version(body.new_version))
        return WeightVersionReply(success=True, new_version=body.new_version)

    @router.get("/weight_info")
    async def weight_info() -> WeightInfo:
        return WeightInfo(weight_version=engine.weight_version)

    return router


def _reload_directory(body: CollectiveRpcRequest, start: str) -> Path:
    """The directory to load from; refuses every call but `reload_weights`."""
    if body.method != "reload_weights":
        raise RequestRefused(
            f"method {body.method!r} is not supported; the embedded server knows `reload_weights`",
            parameter="method",
        )
    options = dict(body.kwargs)
    path = options.pop("weights_path", start)
    if not options.pop("is_checkpoint_format", True) or options or body.args:
        raise RequestRefused(
            "reload_weights takes the keyword argument `weights_path` only", parameter="kwargs"
        )
    if not isinstance(path, str):
        raise RequestRefused("weights_path must be a string", parameter="kwargs")
    return Path(path)

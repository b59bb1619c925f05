"""Routes that generate or tokenize."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel

from local_stack.inference.engine import Engine
from local_stack.inference.errors import EngineFailure, RequestRefused
from local_stack.inference.reading import RequestReader, plain_message
from local_stack.inference.replying import ReplyWriter
from local_stack.inference.sequences import Generation, GenerationRequest
from schemas.inference import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerateRequest,
    TokenizeReply,
    TokenizeRequest,
)


def generation_routes(engine: Engine, model_name: str) -> APIRouter:
    """Make the routes over an engine that serves `model_name`."""
    router = APIRouter()
    reader = RequestReader(
        engine.codec, vocabulary_size=engine.vocabulary_size, max_model_len=engine.max_model_len
    )
    writer = ReplyWriter(engine.codec, model_name)

    def check_model(asked: str | None) -> None:
        if asked not in (None, model_name):
            raise RequestRefused(
                f"The model `{asked}` does not exist. Valid aliases: {model_name}.",
                parameter="model",
                status=404,
                kind="NotFoundError",
            )

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, http: Request) -> Response:
        check_model(body.model)
        generations = await _run(engine, reader.completion(body), http)
        return _json(writer.completion(body, generations))

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, http: Request) -> Response:
        check_model(body.model)
        (generation,) = await _run(engine, [reader.chat(body)], http)
        return _json(writer.chat(body, generation))

    @router.post("/generate")
    async def generate(body: GenerateRequest, http: Request) -> Response:
        (generation,) = await _run(engine, [reader.generate(body)], http)
        return _json(writer.generate(body, generation))

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        check_model(body.model)
        special = body.add_special_tokens
        if body.messages is not None:
            ids = engine.codec.encode_chat(
                [plain_message(message) for message in body.messages],
                add_generation_prompt=body.add_generation_prompt,
            )
        elif body.prompt is not None:
            ids = engine.codec.encode(body.prompt, add_special_tokens=special is None or special)
        else:
            raise RequestRefused("`prompt` or `messages` must be given", parameter="prompt")
        return _json(TokenizeReply(count=len(ids), max_model_len=engine.max_model_len, tokens=ids))

    return router


def _json(reply: BaseModel) -> Response:
    return Response(reply.model_dump_json(), media_type="application/json")


async def _run(engine: Engine, requests: Sequence[GenerationRequest], http: Request) -> list[Generation]:
    """Generate; if the client goes away meanwhile, stop."""
    if not engine.alive:
        raise EngineFailure("the engine has stopped")
    for request in requests:
        engine.submit(request)
    work = asyncio.gather(*(asyncio.wrap_future(request.future) for request in requests))
    departure = asyncio.create_task(_departed(http))
    try:
        waited_for: set[asyncio.Future[Any]] = {work, departure}
        await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise EngineFailure("the client has closed the connection")
        return await work
    finally:
        departure.cancel()
        if not work.done():
            work.cancel()
            for request in requests:
                engine.cancel(request)


async def _departed(http: Request) -> None:
    """Return when the client has closed the connection (its request has been read in full before)."""
    while (await http.receive())["type"] != "http.disconnect":
        pass

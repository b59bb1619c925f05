"""A stand-in for SGLang: its routes over a real model, which misbehave on demand.

Bodies are validated by `schemas.sglang`, so a misspelt field is refused. Run as a program it is a server in a
process of its own, steered by a route `/stand_in` that SGLang does not have.
"""

from __future__ import annotations

import argparse
import json
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from transformers import AutoModelForCausalLM

from schemas import sglang as wire
from tests.trainer.sglang_engine import Engine, Running

BODIES: dict[str, type[BaseModel]] = {
    "/pause_generation": wire.PauseRequest,
    "/continue_generation": wire.ContinueRequest,
    "/update_weight_version": wire.WeightVersionRequest,
    "/update_weights_from_disk": wire.DiskUpdateRequest,
    "/init_weights_update_group": wire.GroupInitRequest,
    "/destroy_weights_update_group": wire.GroupDestroyRequest,
    "/begin_weight_update": wire.UpdateBeginRequest,
    "/update_weights_from_distributed": wire.GroupUpdateRequest,
    "/end_weight_update": wire.UpdateEndRequest,
    "/generate": wire.GenerateRequest,
}
OPEN_ROUTES = ("/health", "/ready")
Answer = tuple[int, Any]


class SglangStandIn:
    """One server. `faults` maps a path to what it answers instead of doing its job; None does the job."""

    def __init__(self, model: Any) -> None:
        self.engine = Engine(model)
        self.calls: list[str] = []
        self.bodies: list[tuple[str, Any]] = []
        self.faults: dict[str, Callable[[], Answer | None]] = {}
        self.key: str | None = None
        self.admin_key: str | None = None
        self.starting = self.unhealthy = False
        self.info: dict[str, Any] = {"tp_size": 1, "dp_size": 1, "pp_size": 1, "version": "0.5.23"}
        self.health_seconds = 0.05
        """How long `/health` waits for a token; SGLang: 20."""
        self.released = threading.Event()
        """Ends every hang."""
        self.url = ""

    def paths(self) -> list[str]:
        return [call.split(" ")[1].split("?")[0] for call in self.calls]

    def hang(self) -> Answer:
        self.released.wait(30)
        return 500, {"error": "woken"}

    def answer(
        self, method: str, path: str, query: dict[str, str], token: str | None, content: bytes
    ) -> Answer:
        if not self._may(path, token):
            return 401, {"error": "Unauthorized"}
        if fault := self.faults.get(path):
            instead = fault()
            if instead is not None:
                return instead
        body: Any = None
        if path in BODIES:
            try:
                body = BODIES[path].model_validate_json(content)
            except ValidationError as error:
                return 400, {"object": "error", "message": str(error), "type": "Bad Request", "code": 400}
            self.bodies.append((path, json.loads(content)))
        return (self._get if method == "GET" else self._post)(path, query, body)

    def _may(self, path: str, token: str | None) -> bool:
        if path.startswith(OPEN_ROUTES):
            return True
        administrative = path not in ("/generate", "/model_info", "/server_info")
        needed = self.admin_key if administrative and self.admin_key else self.key
        return needed is None or token == f"Bearer {needed}"

    def _get(self, path: str, query: dict[str, str], body: Any) -> Answer:
        match path:
            case "/health":
                if self.starting:
                    return 503, None
                if self.engine.held_back:
                    time.sleep(self.health_seconds)
                    self.unhealthy = True
                    return 503, None
                self.unhealthy = False
                return 200, None
            case "/ready":
                return (503 if self.starting or self.unhealthy or self.engine.held_back else 200), None
            case "/model_info":
                name = self.engine.model_path
                reply = {"model_path": name, "served_model_name": name, "is_generation": True}
                return 200, reply | {"weight_version": self.engine.label}
            case "/server_info":
                return 200, self.info
        return 404, {"detail": "Not Found"}

    def _post(self, path: str, query: dict[str, str], body: Any) -> Answer:
        engine = self.engine
        match path:
            case "/pause_generation":
                engine.pause(body.mode)
                return 200, {"message": "Generation paused successfully.", "status": "ok"}
            case "/continue_generation":
                engine.resume()
                return 200, {"message": "Generation continued successfully.", "status": "ok"}
            case "/flush_cache":
                refusal = engine.flush(float(query.get("timeout", 0)))
                return (200, "Cache flushed.\n") if refusal is None else (400, refusal)
            case "/update_weight_version":
                if body.abort_all_requests:
                    engine.pause("abort")
                    engine.resume()
                engine.set_label(body.new_version)
                return 200, {"success": True, "message": "updated", "new_version": body.new_version}
            case "/update_weights_from_disk":
                return _done(
                    engine.load_directory(
                        Path(body.model_path), flush=body.flush_cache, label=body.weight_version
                    )
                )
            case "/generate":
                return self._generate(body)
        return self._transfer(path, body)

    def _transfer(self, path: str, body: Any) -> Answer:
        engine = self.engine
        match path:
            case "/init_weights_update_group":
                try:
                    engine.join(
                        address=body.master_address,
                        port=body.master_port,
                        world_size=body.world_size,
                        rank=body.rank_offset,
                        name=body.group_name,
                        backend=body.backend,
                    )
                except (RuntimeError, ValueError) as error:
                    return _done(f"Failed to initialize custom process group: {error}.")
                return _done(None)
            case "/destroy_weights_update_group":
                left = engine.leave(body.group_name)
                return _done(None if left else "The group to be destroyed does not exist.")
            case "/begin_weight_update":
                if engine.in_session:
                    return _done("a weight-update session is already open; call end_weight_update() first")
                engine.in_session = True
                return _done(None)
            case "/end_weight_update":
                if not engine.in_session:
                    return _done("no weight-update session is open; call begin_weight_update() first")
                engine.in_session = False
                return _done(None)
            case "/update_weights_from_distributed":
                if not engine.in_session:
                    return _done("update_weights_from_distributed must run between begin_weight_update() and")
                assert not body.flush_cache, "the cache would be emptied for every bucket"
                return _done(engine.receive(body.names, body.dtypes, body.shapes, body.group_name))
        return 404, {"detail": "Not Found"}

    def _generate(self, body: wire.GenerateRequest) -> Answer:
        several = bool(body.input_ids) and isinstance(body.input_ids[0], list)
        prompts: Any = body.input_ids if several else [body.input_ids]
        sampling = body.sampling_params
        replies = []
        for prompt in prompts:
            request = Running(
                prompt=list(prompt),
                max_new_tokens=sampling.max_new_tokens or 0,
                temperature=sampling.temperature or 1.0,
                scores_prompt=body.logprob_start_len == 0,
            )
            replies.append(_reply(self.engine.generate(request), body))
        return 200, replies if several else replies[0]


def _done(refusal: str | None) -> Answer:
    success = refusal is None
    return (200 if success else 400), {"success": success, "message": refusal or "Succeeded."}


def _reply(request: Running, body: wire.GenerateRequest) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "id": "0",
        "finish_reason": {"type": "abort", "message": "Abort"} if request.aborted else {"type": "length"},
        "prompt_tokens": len(request.prompt),
        "completion_tokens": len(request.output),
        "cached_tokens": request.cached_tokens,
        "num_retractions": request.retractions,
        "weight_version": request.versions[-1] if request.versions else "default",
    }
    if body.return_logprob:
        told = zip(request.output, request.logprobs, strict=True)
        meta["output_token_logprobs"] = [[float(row[token]), token, None] for token, row in told]
        if body.top_logprobs_num:
            meta["output_top_logprobs"] = [_likeliest(row, body.top_logprobs_num) for row in request.logprobs]
        if request.prompt_logprobs is not None:
            own = zip(request.prompt_logprobs, request.prompt[1:], strict=False)
            scored = [[float(row[token]), _as_told(token, len(row)), None] for row, token in own]
            meta["input_token_logprobs"] = [[None, request.prompt[0], None], *scored]
    return {"text": "", "output_ids": request.output, "meta_info": meta}


def _as_told(token: int, vocabulary: int) -> int:
    return token if token < vocabulary - 1 else 0


def _likeliest(row: torch.Tensor, count: int) -> list[list[Any]]:
    values, ids = row.topk(count)
    return [[value, token, None] for value, token in zip(values.tolist(), ids.tolist(), strict=True)]


# --- serving --------------------------------------------------------------------------------------


def application(stand_in: SglangStandIn) -> Starlette:
    async def endpoint(request: Request) -> Response:
        content = await request.body()
        path, query = request.url.path, request.url.query
        if path == "/stand_in":
            status, reply = steer(stand_in, json.loads(content))
        else:
            stand_in.calls.append(f"{request.method} {path}" + (f"?{query}" if query else ""))
            status, reply = await run_in_threadpool(
                stand_in.answer,
                request.method,
                path,
                dict(request.query_params),
                request.headers.get("authorization"),
                content,
            )
        if reply is None or isinstance(reply, str):
            return Response(reply or "", status, media_type="text/plain")
        return Response(json.dumps(reply), status, media_type="application/json")

    return Starlette(routes=[Route("/{path:path}", endpoint, methods=["GET", "POST"])])


def steer(stand_in: SglangStandIn, wishes: dict[str, Any]) -> Answer:
    """Set what the engine does wrong, in a process of its own; replies with what has happened so far."""
    for name, value in wishes.items():
        setattr(stand_in if name == "calls" else stand_in.engine, name, value)
    return 200, {
        "calls": stand_in.calls,
        "paths": Counter(stand_in.paths()),
        "in_session": stand_in.engine.in_session,
        "groups": len(stand_in.engine.groups),
    }


@contextmanager
def serving(*stand_ins: SglangStandIn) -> Iterator[None]:
    """Serve each stand-in on its own port until the block ends."""
    running = []
    for stand_in in stand_ins:
        listener = socket.create_server(("127.0.0.1", 0))
        stand_in.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(
            uvicorn.Config(application(stand_in), log_config=None, timeout_graceful_shutdown=2)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        running.append((stand_in, server, thread, listener))
    try:
        yield
    finally:
        for stand_in, server, thread, listener in running:
            stand_in.released.set()
            stand_in.engine.resume()
            server.should_exit = True
            thread.join(20)
            listener.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--port-file", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    stand_in = SglangStandIn(AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32))
    with serving(stand_in):
        part = arguments.port_file.with_suffix(".part")
        part.write_text(stand_in.url)
        part.rename(arguments.port_file)
        threading.Event().wait()


if __name__ == "__main__":
    main()

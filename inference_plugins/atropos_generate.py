"""Atropos's `/generate` for a stock vLLM server, as a plain ASGI middleware.

    PYTHONPATH=inference_plugins vllm serve MODEL --middleware atropos_generate.AtroposGenerate

Environments with `server_type: vllm` post token ids to `/generate` and read token ids and log-probs back.
Stock vLLM has no such route, but its `/v1/completions` can say the same. Nothing of vLLM is patched or even
imported: the request is rewritten on its way in, the reply on its way out. Every other route passes through
untouched, and so does any reply that is not a success.

Loaded into another program: standard library only, one file.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_COMPLETIONS = "/v1/completions"


class AtroposGenerate:
    """Answers `POST /generate` through the wrapped application's `/v1/completions`."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or scope["path"] != "/generate" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            body = json.dumps(to_completion_request(json.loads(await _read(receive)))).encode()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            await _answer(send, 400, {"error": f"not a /generate request: {type(error).__name__}: {error}"})
            return
        reply = _Collected()
        await self._app(_redirected(scope, len(body)), _replaying(body, receive), reply.collect)
        if reply.status != 200:
            await _answer(send, reply.status, reply.body)
            return
        try:
            answer = to_generate_reply(json.loads(reply.body))
        except (ValueError, KeyError, TypeError) as error:
            await _answer(send, 502, {"error": f"{_COMPLETIONS} answered unexpectedly: {error!r}"})
            return
        await _answer(send, 200, answer)


def to_completion_request(request: dict[str, Any]) -> dict[str, Any]:
    """Turn a `/generate` request into one for `/v1/completions`; sampling parameters stay as they are.

    >>> to_completion_request({"prompt": {"prompt_token_ids": [5, 6]}, "n": 2, "logprobs": 0})
    {'n': 2, 'logprobs': 0, 'prompt': [5, 6], 'return_token_ids': True}
    """
    request = dict(request)
    prompt = request.pop("prompt")
    request.setdefault("logprobs", 0)
    request["prompt"] = prompt["prompt_token_ids"] if isinstance(prompt, dict) else prompt
    request["return_token_ids"] = True
    return request


def to_generate_reply(completion: dict[str, Any]) -> dict[str, Any]:
    """Turn a `/v1/completions` reply into what `/generate` answers.

    Raises:
        ValueError: The number of log-probs is not the number of tokens; Atropos would pair them wrongly.
    """
    choices = sorted(completion["choices"], key=lambda choice: int(choice["index"]))
    reply = {
        "text": [choice["text"] for choice in choices],
        "finish_reasons": [choice["finish_reason"] for choice in choices],
        "logprobs": [_token_logprobs(choice) for choice in choices],
        "token_ids": [choice["token_ids"] for choice in choices],
        "prompt_token_ids": choices[0]["prompt_token_ids"],
    }
    if choices[0].get("prompt_logprobs") is not None:
        reply["prompt_logprobs"] = [
            {token: entry["logprob"] for token, entry in position.items()} if position else None
            for position in choices[0]["prompt_logprobs"]
        ]
    return reply


def _token_logprobs(choice: dict[str, Any]) -> list[list[dict[str, float]]]:
    """One `[{token id: log-prob}]` for each sampled token."""
    tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    if len(tokens) != len(logprobs):
        raise ValueError(f"{len(tokens)} tokens but {len(logprobs)} log-probs")
    return [[{str(token): logprob}] for token, logprob in zip(tokens, logprobs, strict=True)]


class _Collected:
    """A reply of the wrapped application, kept instead of sent."""

    def __init__(self) -> None:
        self.status = 500
        self.body = b""

    async def collect(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self.body += message.get("body", b"")


async def _read(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


def _redirected(scope: MutableMapping[str, Any], length: int) -> dict[str, Any]:
    replaced = {b"content-length", b"content-type", b"transfer-encoding", b"accept-encoding"}
    headers = [(name, value) for name, value in scope["headers"] if name.lower() not in replaced]
    headers += [(b"content-length", str(length).encode()), (b"content-type", b"application/json")]
    return {**scope, "path": _COMPLETIONS, "raw_path": _COMPLETIONS.encode(), "headers": headers}


def _replaying(body: bytes, receive: Receive) -> Receive:
    """Hand out `body`, then whatever the connection says next: a client that goes away is noticed."""
    handed_out = False

    async def replay() -> Message:
        nonlocal handed_out
        if handed_out:
            return await receive()
        handed_out = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _answer(send: Send, status: int, content: bytes | dict[str, Any]) -> None:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

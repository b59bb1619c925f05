"""Atropos's `/generate` for a stock vLLM server, as a plain ASGI middleware.

    PYTHONPATH=inference_plugins vllm serve MODEL --middleware atropos_generate.AtroposGenerate

Environments with `server_type: vllm` post token ids to `/generate` and read token ids and log-probs back.
Stock vLLM has no such route, but its `/v1/completions` can say the same. Nothing of vLLM is patched or even
imported: the request is rewritten on its way in, the reply on its way out. vLLM's own checks, authentication
included, see the rewritten request; its refusals reach the caller with their status and body.

    POST /generate          sample from the current policy; every reply says from which weights
    GET  /atropos/adapter   the adapter that is the current policy, if one is
    POST /atropos/adapter   {"name": "policy-v000003", "weight_version": "3"}: make it the current policy;
                            {"name": null} goes back to the model itself

Every other route passes through untouched. What is remembered between requests is the current adapter, in
this process: one API server process has to serve all requests, as vLLM asks of whoever loads adapters.

Loaded into another program: standard library only, one file.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, NoReturn

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Label = Callable[[], Awaitable["str | None"]]
Headers = list[tuple[bytes, bytes]]

MAX_BODY_BYTES = 64 * 2**20
"""Of a request: a prompt of a million token ids takes 8 MiB."""
LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have; the value is vLLM's."""

_COMPLETIONS = "/v1/completions"
_MODELS = "/v1/models"
_WEIGHT_INFO = "/weight_info"
_JSON = (b"content-type", b"application/json")

_NEUTRAL_SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Sent where the request is silent. `/v1/completions` would take the model's own `generation_config.json`:
often a truncated distribution, and then the log-probs are not those of the sampling."""


class RequestRefused(ValueError):  # noqa: N818 - the outcome is the name
    """A request that cannot be answered; the message tells the caller why.

    Args:
        message: What was found and what to do.
        param: The field at fault, where it is one.
        status: Of the reply.
        allowed: The methods that the route has, where the method is at fault.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: HTTPStatus = HTTPStatus.BAD_REQUEST,
        allowed: str | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.headers = [(b"allow", allowed.encode())] if allowed else []


class ClientGone(Exception):  # noqa: N818 - an event, nobody's error
    """The client closed its connection before it had said everything."""


@dataclass(frozen=True)
class Adapter:
    """The adapter that `/generate` samples from."""

    name: str
    """Its name in `/v1/models`."""
    weight_version: str | None
    """The label of its weights in replies; None for no label."""

    async def label(self) -> str | None:
        """An adapter's weights do not change under its name."""
        return self.weight_version


class AtroposGenerate:
    """Answers `/generate` and `/atropos/adapter`, and hands everything else to the wrapped application."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._adapter: Adapter | None = None
        self._shows_label = True  # until it turns out to have no route for it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        routes = {"/generate": self._generate, "/atropos/adapter": self._current_adapter}
        route = routes.get(_local_path(scope)) if scope["type"] == "http" else None
        if route is None or scope["method"] == "OPTIONS":
            await self._app(scope, receive, send)
            return
        try:
            await route(scope, receive, send)
        except RequestRefused as error:
            await _send_error(send, error)
        except ClientGone:
            pass  # there is nobody to answer

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            _refuse_method("POST")
        request = to_completion_request(_decode(await _read(receive)))
        label = await self._choose_model(scope, request)
        start = await label()
        connection = _Replay(_encode(request), receive)
        reply = _Collected()
        await self._app(_redirected(scope, _COMPLETIONS, connection.body), connection.receive, reply.send)
        if connection.closed:
            return
        if reply.status != HTTPStatus.OK:
            await _respond(send, reply.status, reply.body, reply.headers)
            return
        try:
            answer = to_generate_reply(json.loads(reply.body))
            if start is not None:
                answer["weight_version_start"] = start
                answer["weight_version"] = await label()
            body = json.dumps(answer, allow_nan=False).encode()
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            message = f"{_COMPLETIONS} answered unexpectedly: {error!r}"
            raise RequestRefused(message, status=HTTPStatus.BAD_GATEWAY) from error
        await _respond(send, HTTPStatus.OK, body, reply.headers)

    async def _choose_model(self, scope: Scope, request: dict[str, Any]) -> Label:
        """Put the current policy into a request, unless it asks for another adapter by name.

        Returns:
            Tells the label of the weights that answer the request, at the moment it is called.
        """
        adapter, named = self._adapter, request.get("model")
        if named is not None and (adapter is None or named != adapter.name):
            models = await self._ask(scope, _MODELS)
            if models.status != HTTPStatus.OK or named not in _names(models, adapters=False):
                return _no_label  # another adapter, or nothing that there is: vLLM will say
        if adapter is None:
            return lambda: self._served_label(scope)
        request["model"] = adapter.name
        return adapter.label

    async def _served_label(self, scope: Scope) -> str | None:
        if not self._shows_label:
            return None
        info = await self._ask(scope, _WEIGHT_INFO)
        if info.status == HTTPStatus.NOT_FOUND:
            self._shows_label = False  # vLLM without VLLM_SERVER_DEV_MODE=1
        if info.status != HTTPStatus.OK:
            return None
        label = json.loads(info.body)["weight_version"]
        return None if label is None else str(label)

    async def _current_adapter(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in ("GET", "POST"):
            _refuse_method("GET, POST")
        # Whoever may list the models may do this: vLLM's own authentication decides.
        models = await self._ask(scope, _MODELS)
        if models.status != HTTPStatus.OK:
            await _respond(send, models.status, models.body, models.headers)
            return
        if scope["method"] == "POST":
            self._adapter = _to_adapter(_decode(await _read(receive)), _names(models, adapters=True))
        current = self._adapter
        answer = {
            "name": current and current.name,
            "weight_version": current and current.weight_version,
        }
        await _respond(send, HTTPStatus.OK, json.dumps(answer).encode(), [_JSON])

    async def _ask(self, scope: Scope, path: str) -> _Collected:
        """GET a route of the wrapped application with the caller's credentials, inside this process."""
        reply = _Collected()
        await self._app(_redirected(scope, path, b"", method="GET"), _Replay(b"", _never).receive, reply.send)
        return reply


def to_completion_request(request: dict[str, Any]) -> dict[str, Any]:
    """Turn a `/generate` request into one for `/v1/completions`; what it asks of the sampling stays as it is.

    >>> request = {"prompt": {"prompt_token_ids": [5, 6]}, "n": 2, "logprobs": 0, "top_p": 0.9}
    >>> rewritten = to_completion_request(request)
    >>> rewritten["prompt"], rewritten["n"], rewritten["top_p"], rewritten["temperature"]
    ([5, 6], 2, 0.9, 1.0)

    Raises:
        RequestRefused: It has no prompt, several, or wants something that `/generate` does not do.
    """
    request = {name: value for name, value in request.items() if value is not None}  # null: the default
    if request.pop("stream", False):
        raise RequestRefused("/generate does not stream: send `stream: false`", param="stream")
    if request.pop("echo", False):
        raise RequestRefused("/generate does not repeat the prompt: ask for `prompt_logprobs`", param="echo")
    return {
        **_NEUTRAL_SAMPLING,
        **_with_stop_token_ids(request),
        "prompt": _one_prompt(request.get("prompt")),
        "return_token_ids": True,
        # Otherwise the keys of the likeliest tokens are texts, and several tokens can have the same text.
        "return_tokens_as_token_ids": True,
    }


def _with_stop_token_ids(request: dict[str, Any]) -> dict[str, Any]:
    """Token ids in `stop`, where environments put their end-of-sequence token, are no texts for vLLM.

    >>> _with_stop_token_ids({"stop": [2, "."], "stop_token_ids": [3]})
    {'stop': ['.'], 'stop_token_ids': [3, 2]}
    """
    stop = request.get("stop")
    entries = stop if isinstance(stop, list) else [stop]
    ids = [each for each in entries if isinstance(each, int) and not isinstance(each, bool)]
    if not ids:
        return request
    known = request.get("stop_token_ids") or []
    return {
        **request,
        "stop": [each for each in entries if each not in ids],
        "stop_token_ids": [*known, *ids],
    }


def to_generate_reply(completion: dict[str, Any]) -> dict[str, Any]:
    """Turn a `/v1/completions` reply into what `/generate` answers.

    Raises:
        ValueError: Not every token has a log-prob; Atropos would pair them wrongly.
        LookupError: vLLM left something out.
    """
    choices = sorted(completion["choices"], key=lambda choice: int(choice["index"]))
    prompt_logprobs = choices[0].get("prompt_logprobs")
    return {
        "text": [choice["text"] for choice in choices],
        "finish_reasons": [choice["finish_reason"] for choice in choices],
        "prompt_token_ids": choices[0]["prompt_token_ids"],
        "token_ids": [choice["token_ids"] for choice in choices],
        "logprobs": (
            None
            if choices[0].get("logprobs") is None
            else [_token_logprobs(choice["token_ids"], choice["logprobs"]) for choice in choices]
        ),
        "prompt_logprobs": prompt_logprobs and _prompt_logprobs(prompt_logprobs),
    }


def _one_prompt(prompt: Any) -> str | list[int]:
    """The prompt itself, from any of the ways to write it."""
    if isinstance(prompt, dict):
        given = [prompt[name] for name in ("prompt_token_ids", "prompt") if prompt.get(name) is not None]
        if len(given) != 1:
            raise RequestRefused(
                f"`prompt` needs either `prompt_token_ids` or `prompt`, and has {sorted(map(str, prompt))}",
                param="prompt",
            )
        (prompt,) = given
    if isinstance(prompt, list) and any(isinstance(each, (list, str, dict)) for each in prompt):
        raise RequestRefused("/generate takes one prompt: send one request for each", param="prompt")
    if not isinstance(prompt, (str, list)):
        raise RequestRefused(
            f"`prompt` has to be a text or a list of token ids, not {type(prompt).__name__}", param="prompt"
        )
    return prompt


def _token_logprobs(token_ids: list[int], logprobs: dict[str, Any]) -> list[list[dict[str, float]]]:
    """One `[{token id: log-prob}]` for each sampled token: itself first, then the likeliest ones."""
    own, top = logprobs["token_logprobs"], logprobs["top_logprobs"]
    if not len(token_ids) == len(own) == len(top):
        raise ValueError(f"{len(token_ids)} tokens but {len(own)} log-probs, {len(top)} of the likeliest")
    return [
        # A key that is there already keeps its place.
        [{str(token): _finite(value)} | {_token_id(name): _finite(each) for name, each in others.items()}]
        for token, value, others in zip(token_ids, own, top, strict=True)
    ]


def _prompt_logprobs(positions: list[dict[str, Any] | None]) -> list[dict[str, float] | None]:
    """For each token of the prompt: itself first, then the likeliest ones. Nothing predicts the first."""
    return [
        position and {token: _finite(entry["logprob"]) for token, entry in position.items()}
        for position in positions
    ]


def _token_id(name: str) -> str:
    prefix, _, number = name.rpartition(":")
    if prefix != "token_id":
        raise ValueError(f"a token is named {name!r} instead of by its id")
    return number


def _finite(logprob: float) -> float:
    return max(float(logprob), LOWEST_LOGPROB)


def _to_adapter(wanted: dict[str, Any], known: list[str]) -> Adapter | None:
    name, label = wanted.get("name"), wanted.get("weight_version")
    for param, value in (("name", name), ("weight_version", label)):
        if not isinstance(value, (str, type(None))):
            raise RequestRefused(f"`{param}` has to be a string or null, not {value!r}", param=param)
    if "name" not in wanted:
        raise RequestRefused("`name` is missing: an adapter's, or null for the model itself", param="name")
    if name is None:
        return None
    if name not in known:
        message = f"there is no adapter {name!r}; these are loaded: {known}"
        raise RequestRefused(message, param="name", status=HTTPStatus.NOT_FOUND)
    return Adapter(name, label)


def _names(models: _Collected, *, adapters: bool) -> list[str]:
    """Names in a reply of `/v1/models`: of the adapters, or of the model itself."""
    cards = json.loads(models.body)["data"]
    return [card["id"] for card in cards if (card.get("parent") is not None) == adapters]


# --- ASGI -----------------------------------------------------------------------------------------


@dataclass
class _Collected:
    """A reply of the wrapped application, kept instead of sent."""

    status: int = 500
    headers: Headers = field(default_factory=list)
    body: bytes = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], list(message.get("headers", []))
        elif message["type"] == "http.response.body":
            self.body += message.get("body", b"")


class _Replay:
    """Hands out `body`, then whatever the connection says next: a client that goes away is noticed."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self.body = body
        self.closed = False
        self._handed_out = False
        self._receive = receive

    async def receive(self) -> Message:
        if not self._handed_out:
            self._handed_out = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        message = await self._receive()
        self.closed = self.closed or message["type"] == "http.disconnect"
        return message


async def _no_label() -> None:
    """Nothing is known of the weights."""


async def _never() -> Message:
    """A connection on which nothing more is said."""
    await asyncio.Event().wait()
    raise AssertionError


def _local_path(scope: Scope) -> str:
    """The path below the prefix that the server is mounted at, if it has one and the request names it."""
    path, root = str(scope["path"]), _root(scope)
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _root(scope: Scope) -> str:
    return str(scope.get("root_path") or "").rstrip("/")


def _redirected(scope: Scope, path: str, body: bytes, *, method: str = "POST") -> dict[str, Any]:
    root = _root(scope)
    if root and str(scope["path"]).startswith(f"{root}/"):
        path = root + path
    replaced = {b"content-length", b"content-type", b"transfer-encoding", b"accept-encoding"}
    headers = [*_without(scope["headers"], replaced), _JSON, _length(body)]
    return {
        **scope,
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        "state": dict(scope.get("state") or {}),
    }


def _without(headers: Iterable[tuple[bytes, bytes]], names: set[bytes]) -> Headers:
    return [(name, value) for name, value in headers if name.lower() not in names]


def _length(body: bytes) -> tuple[bytes, bytes]:
    return b"content-length", str(len(body)).encode()


async def _read(receive: Receive) -> bytes:
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            reason = f"the body is longer than {MAX_BODY_BYTES} bytes"
            raise RequestRefused(reason, status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        more = message.get("more_body", False)
    return bytes(body)


def _decode(body: bytes) -> dict[str, Any]:
    try:
        request = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RequestRefused(f"the body is not JSON: {error}") from error
    if not isinstance(request, dict):
        raise RequestRefused(f"the body has to be a JSON object, not a {type(request).__name__}")
    return request


def _encode(request: dict[str, Any]) -> bytes:
    try:
        return json.dumps(request, allow_nan=False).encode()
    except ValueError as error:  # 1e999 is JSON, and reads as infinity
        raise RequestRefused(f"a number is too large: {error}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _refuse_method(allowed: str) -> NoReturn:
    message = f"Method Not Allowed: use {allowed}"
    raise RequestRefused(message, status=HTTPStatus.METHOD_NOT_ALLOWED, allowed=allowed)


async def _send_error(send: Send, error: RequestRefused) -> None:
    """Refuse in the words that vLLM uses."""
    kind = "".join(error.status.phrase.title().split()) + "Error"
    info = {"message": str(error), "type": kind, "param": error.param, "code": int(error.status)}
    await _respond(send, error.status, json.dumps({"error": info}).encode(), [_JSON, *error.headers])


async def _respond(send: Send, status: int, body: bytes, headers: Headers) -> None:
    headers = [*_without(headers, {b"content-length", b"transfer-encoding"}), _length(body)]
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": body})

"""`/generate` for stock vLLM: over the embedded server, which has vLLM's routes, and over a broken one.

What Atropos reads of it is in `tests/local_stack/test_inference_routes.py`, and what a real vLLM makes of it
in `tests/vllm`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from inference_plugins import atropos_generate
from inference_plugins.atropos_generate import AtroposGenerate
from schemas.inference import CurrentAdapter, ErrorReply
from tests.compose import ROOT
from tests.conftest import RunningInferenceServer

PROMPT = [72, 101, 108, 108, 111]
REQUEST = {"prompt": {"prompt_token_ids": PROMPT}, "logprobs": 0, "max_tokens": 5, "temperature": 0.0}

Over = Callable[[Any], httpx.AsyncClient]


def over(app: Any, *, root_path: str = "") -> httpx.AsyncClient:
    """A client of the middleware around an application."""
    transport = httpx.ASGITransport(app=AtroposGenerate(app), root_path=root_path)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@dataclass
class StandIn:
    """An application that answers completions with `reply`, and keeps what it was asked."""

    reply: Any = None
    status: int = 200
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    token: str | None = None
    label: str | None = None
    adapters: list[str] = field(default_factory=list)
    seen: list[tuple[str, str, Any]] = field(default_factory=list)
    cancelled: bool = False
    endless: bool = False

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        self.seen.append((scope["method"], scope["path"], json.loads(body) if body else None))
        if self.token and path.startswith("/v1") and self._given(scope) != self.token:
            return await self._answer(send, 401, {"error": "Unauthorized"})
        if path == "/v1/models":
            cards = [{"id": "base", "parent": None}, *({"id": x, "parent": "base"} for x in self.adapters)]
            return await self._answer(send, 200, {"data": cards})
        if path == "/weight_info" and self.label is not None:
            return await self._answer(send, 200, {"weight_version": self.label})
        if path != "/v1/completions":
            return await self._answer(send, 404, {"error": "no such route"})
        if self.endless:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.cancelled = True
            return None
        return await self._answer(send, self.status, self.reply)

    async def _answer(self, send: Any, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        headers = [(b"content-length", str(len(body)).encode()), *self.headers]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        # In two parts, as a server may.
        await send({"type": "http.response.body", "body": body[:7], "more_body": True})
        await send({"type": "http.response.body", "body": body[7:]})

    @staticmethod
    def _given(scope: MutableMapping[str, Any]) -> str | None:
        return next((value.decode() for name, value in scope["headers"] if name == b"authorization"), None)

    def completions(self) -> list[Any]:
        """Bodies of the completion requests."""
        return [body for _, path, body in self.seen if path.endswith("/v1/completions")]


def choice(index: int = 0, *, tokens: tuple[int, ...] = (7, 8), **fields: Any) -> dict[str, Any]:
    """One choice as vLLM writes it."""
    return {
        "index": index,
        "text": str(index),
        "finish_reason": "stop",
        "token_ids": list(tokens),
        "prompt_token_ids": PROMPT,
        "prompt_logprobs": None,
        "logprobs": {
            "token_logprobs": [-0.5] * len(tokens),
            "top_logprobs": [{f"token_id:{token}": -0.5} for token in tokens],
        },
        **fields,
    }


# --- over the embedded server ---------------------------------------------------------------------


async def test_a_refusal_reaches_the_caller_as_it_is(
    shared_inference_server: RunningInferenceServer,
) -> None:
    reply = shared_inference_server.post("/generate", {**REQUEST, "max_tokens": -1})
    assert reply.status_code == 400
    assert "max_tokens" in ErrorReply.model_validate(reply.json()).error.message


async def test_the_first_label_is_that_of_the_arrival_and_the_last_that_of_the_end(
    inference_server: RunningInferenceServer,
) -> None:
    async with httpx.AsyncClient(base_url=inference_server.url) as client:
        await client.post("/pause", params={"mode": "keep"})
        request = asyncio.create_task(client.post("/generate", json=REQUEST))
        for _ in range(200):  # it arrives, and waits
            await asyncio.sleep(0.005)
        await client.post("/update_weight_version", json={"new_version": "17"})
        await client.post("/resume")
        answer = (await request).json()
    assert (answer["weight_version_start"], answer["weight_version"]) == ("default", "17")


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"not json", "not JSON"),
        (b"\xff\xfe\xff", "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b'{"prompt": [1], "temperature": NaN}', "NaN is no number"),
        (b'{"prompt": [1], "temperature": 1e999}', "too large"),
        (b"[]", "JSON object"),
        (b"{}", "`prompt` has to be"),
        (b'{"prompt": 5}', "`prompt` has to be"),
        (b'{"prompt": {"text": "hello"}}', "`prompt_token_ids`"),
        (b'{"prompt": {"prompt_token_ids": "hello", "prompt": "hello"}}', "either"),
        (b'{"prompt": ["a", "b"]}', "one prompt"),
        (b'{"prompt": [[1], [2]]}', "one prompt"),
        (b'{"prompt": [{"prompt_token_ids": [1]}]}', "one prompt"),
        (b'{"prompt": [1], "stream": true}', "does not stream"),
        (b'{"prompt": [1], "echo": true}', "does not repeat"),
    ],
)
async def test_what_is_not_a_generate_request_is_refused_and_never_asked(body: bytes, message: str) -> None:
    app = StandIn()
    async with over(app) as client:
        reply = await client.post("/generate", content=body)
    assert reply.status_code == 400
    error = ErrorReply.model_validate(reply.json()).error
    assert message in error.message
    assert (error.type, error.code) == ("BadRequestError", 400)
    assert not app.completions()


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_over_the_limit_is_refused(announced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atropos_generate, "MAX_BODY_BYTES", 1000)
    fits, too_long = (b'{"prompt": [1' + b" " * spaces + b"]}" for spaces in (900, 1000))

    async def parts(body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    async with over(StandIn(reply={"choices": [choice()]})) as client:
        statuses = [
            (await client.post("/generate", content=body if announced else parts(body))).status_code
            for body in (fits, too_long)
        ]
    assert statuses == [200, 413]


@pytest.mark.parametrize(
    ("path", "method", "allowed"),
    [("/generate", "GET", "POST"), ("/generate", "PUT", "POST"), ("/atropos/adapter", "DELETE", "GET, POST")],
)
async def test_other_methods_are_not_allowed(path: str, method: str, allowed: str) -> None:
    async with over(StandIn()) as client:
        reply = await client.request(method, path)
    assert (reply.status_code, reply.headers["allow"]) == (405, allowed)


async def test_preflight_requests_of_browsers_reach_the_server() -> None:
    app = StandIn()
    async with over(app) as client:
        await client.options("/generate")
    assert app.seen == [("OPTIONS", "/generate", None)]


# --- what the server may do -----------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 404, 422, 500, 503])
async def test_errors_pass_with_status_body_and_headers(status: int) -> None:
    app = StandIn(reply={"error": "as it is"}, status=status, headers=[(b"retry-after", b"7")])
    async with over(app) as client:
        reply = await client.post("/generate", json=REQUEST)
    assert (reply.status_code, reply.json(), reply.headers["retry-after"]) == (
        status,
        {"error": "as it is"},
        "7",
    )


@pytest.mark.parametrize(
    "broken",
    [
        {"choices": []},
        {"choices": [{"index": 0, "text": "a", "finish_reason": "stop"}]},
        {"choices": [choice(logprobs={"token_logprobs": [-1.0], "top_logprobs": [{}]})]},
        {"choices": [choice(logprobs={"token_logprobs": [-1.0, None], "top_logprobs": [{}, {}]})]},
        {"choices": [choice(logprobs={"token_logprobs": [-1.0, -1.0], "top_logprobs": [{}, {"a": -1.0}]})]},
        {"choices": [choice(logprobs={"token_logprobs": [-1.0, float("nan")], "top_logprobs": [{}, {}]})]},
        [],
        "text",
    ],
)
async def test_a_reply_that_lacks_something_is_an_error_not_a_guess(broken: Any) -> None:
    async with over(StandIn(reply=broken)) as client:
        reply = await client.post("/generate", json=REQUEST)
    assert reply.status_code == 502
    assert "answered unexpectedly" in reply.json()["error"]["message"]


async def test_a_client_that_goes_away_is_noticed_and_not_answered() -> None:
    app = StandIn(endless=True)
    messages = [{"type": "http.request", "body": json.dumps(REQUEST).encode()}, {"type": "http.disconnect"}]
    sent: list[Any] = []
    await asyncio.wait_for(AtroposGenerate(app)(scope_of("/generate"), in_turn(messages), kept(sent)), 5)
    assert app.cancelled
    assert sent == []


async def test_a_client_that_goes_away_before_it_has_said_everything_asks_nothing() -> None:
    app = StandIn()
    messages = [
        {"type": "http.request", "body": b'{"prompt": [1]}', "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[Any] = []
    await asyncio.wait_for(AtroposGenerate(app)(scope_of("/generate"), in_turn(messages), kept(sent)), 5)
    assert (app.seen, sent) == ([], [])


async def test_labels_are_no_longer_asked_for_where_there_are_none() -> None:
    app = StandIn(reply={"choices": [choice()]})
    async with over(app) as client:
        for _ in range(3):
            answer = (await client.post("/generate", json=REQUEST)).json()
            assert "weight_version" not in answer
    assert [path for _, path, _ in app.seen].count("/weight_info") == 1


@pytest.mark.parametrize("prefix", ["", "/behind/a/proxy"])
async def test_a_root_path_is_kept_where_the_request_has_it(prefix: str) -> None:
    app = StandIn(reply={"choices": [choice()]}, label="3")
    async with over(app, root_path="/behind/a/proxy") as client:
        reply = await client.post(f"{prefix}/generate", json=REQUEST)
    assert reply.json()["weight_version"] == "3"
    routes = ("/weight_info", "/v1/completions", "/weight_info")
    assert [path for _, path, _ in app.seen] == [prefix + route for route in routes]


# --- the current adapter --------------------------------------------------------------------------


async def test_the_current_adapter_answers_with_its_label_until_the_model_itself_is_back() -> None:
    app = StandIn(reply={"choices": [choice()]}, label="base-label", adapters=["p-v1", "p-v2"])
    async with over(app) as client:
        asked = []
        for name, label in (("p-v1", "1"), ("p-v2", "2"), (None, None)):
            wanted = {"name": name, "weight_version": label}
            reply = await client.post("/atropos/adapter", json=wanted)
            assert reply.json() == (await client.get("/atropos/adapter")).json() == wanted
            CurrentAdapter.model_validate(reply.json())
            answer = (await client.post("/generate", json=REQUEST)).json()
            asked.append(
                (app.completions()[-1].get("model"), answer["weight_version_start"], answer["weight_version"])
            )
    assert asked == [("p-v1", "1", "1"), ("p-v2", "2", "2"), (None, "base-label", "base-label")]


async def test_a_named_adapter_is_not_replaced_and_has_no_label() -> None:
    app = StandIn(reply={"choices": [choice()]}, label="base-label", adapters=["p-v1", "p-v2"])
    async with over(app) as client:
        await client.post("/atropos/adapter", json={"name": "p-v2", "weight_version": "2"})
        answers = [
            (await client.post("/generate", json={**REQUEST, "model": name})).json()
            for name in ("p-v1", "p-v2", "base", "nobody")
        ]
    assert [body["model"] for body in app.completions()] == ["p-v1", "p-v2", "p-v2", "nobody"]
    assert [answer.get("weight_version") for answer in answers] == [None, "2", "2", None]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"name": "p-v9", "weight_version": "9"}, 404, "['p-v1']"),
        ({"name": "base"}, 404, "['p-v1']"),
        ({}, 400, "`name` is missing"),
        ({"name": 3}, 400, "`name` has to be"),
        ({"name": "p-v1", "weight_version": 3}, 400, "`weight_version` has to be"),
        ([], 400, "JSON object"),
    ],
)
async def test_what_cannot_be_the_current_adapter_changes_nothing(
    body: Any, status: int, message: str
) -> None:
    async with over(StandIn(adapters=["p-v1"])) as client:
        await client.post("/atropos/adapter", json={"name": "p-v1", "weight_version": "1"})
        reply = await client.post("/atropos/adapter", json=body)
        assert (await client.get("/atropos/adapter")).json() == {"name": "p-v1", "weight_version": "1"}
    assert reply.status_code == status
    assert message in reply.json()["error"]["message"]


async def test_who_may_not_list_the_models_may_not_choose_among_them() -> None:
    app = StandIn(token="Bearer right", adapters=["p-v1"])  # noqa: S106
    async with over(app) as client:
        for headers, status in (({}, 401), ({"authorization": "Bearer wrong"}, 401)):
            for method in ("GET", "POST"):
                reply = await client.request(
                    method, "/atropos/adapter", json={"name": "p-v1"}, headers=headers
                )
                assert (reply.status_code, reply.json()) == (status, {"error": "Unauthorized"})
        right = {"authorization": "Bearer right"}
        assert (await client.get("/atropos/adapter", headers=right)).json()["name"] is None
        assert (
            await client.post("/atropos/adapter", json={"name": "p-v1"}, headers=right)
        ).status_code == 200


def test_it_needs_nothing_but_the_standard_library() -> None:
    program = (
        "import sys; sys.path.insert(0, 'inference_plugins'); before = set(sys.modules);"
        "import atropos_generate; new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new - sys.stdlib_module_names))"
    )
    command = [sys.executable, "-I", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['atropos_generate']"


def scope_of(path: str) -> dict[str, Any]:
    """A POST as a server hands it to an application."""
    return {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}


def in_turn(messages: list[dict[str, Any]]) -> Any:
    """Say these, then nothing for ever."""
    left = iter(messages)

    async def receive() -> dict[str, Any]:
        with contextlib.suppress(StopIteration):
            return next(left)
        await asyncio.Event().wait()
        raise AssertionError

    return receive


def kept(sent: list[Any]) -> Any:
    """Keep what is sent."""

    async def send(message: Any) -> None:
        sent.append(message)

    return send

"""An inference server: health, model, the routes that publishing needs, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

import httpx

from atropos_client import AtroposClientError
from schemas import printable
from trainer.check._result import CheckResult, failed, passed, warned
from trainer.config import TrainerConfig
from trainer.publish.engines.connection import ServerConnection, reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLE = "What is 17+4? Answer with one number.\nÄpfel — 猫 — def f(x): return x"

# Routes that publishing calls. A GET changes nothing: a route that takes POST answers 405, a missing one 404.
_PUBLISH_ROUTES = ("/pause", "/resume", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version")


class _Client:
    """Requests to one server, whose replies are bounded in size and time.

    Args:
        url: Its base URL.
        config: Credentials and patience.
    """

    def __init__(self, url: str, config: TrainerConfig) -> None:
        publish = config.publish
        self._seconds = config.atropos.connect_timeout
        self._connection = ServerConnection(url, token=publish.token, headers=publish.headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def get(self, path: str) -> httpx.Response:
        """Send a GET."""
        return self._connection.exchange("GET", path, seconds=self._seconds)

    def post(self, path: str, body: Any) -> httpx.Response:
        """Send JSON."""
        return self._connection.exchange("POST", path, seconds=self._seconds, json=body)


def check_inference_server(
    url: str, config: TrainerConfig, tokenizer: PreTrainedTokenizerBase | None
) -> list[CheckResult]:
    """Probe one server; changes nothing there."""
    name = f"inference {url}"
    results: list[CheckResult] = []
    try:
        with _Client(url, config) as client:
            results += _probes(name, client, config, tokenizer)
    except (httpx.HTTPStatusError, AtroposClientError) as error:
        found = _found(error)
        results.append(failed(name, found, "start it, or correct publish.servers"))
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        found = f"its replies are not those of an inference server ({type(error).__name__}: {error})"
        results.append(failed(name, found, "correct publish.servers, or see what runs at this address"))
    return results


def _found(error: Exception) -> str:
    return reason_of(error) if isinstance(error, AtroposClientError) else f"{type(error).__name__}: {error}"


def _probes(
    name: str, client: _Client, config: TrainerConfig, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[CheckResult]:
    client.get("/health").raise_for_status()
    served = client.get("/v1/models").raise_for_status().json()["data"][0]
    yield passed(name, f"healthy, serves {printable(str(served.get('id')))}")
    yield from _check_length(name, served, config)
    yield _check_routes(name, client)
    yield from _check_environment_route(name, client)
    yield from _check_tokenizer(name, client, served, tokenizer)


def _check_length(name: str, served: dict[str, Any], config: TrainerConfig) -> list[CheckResult]:
    longest, wanted = served.get("max_model_len"), config.atropos.max_token_length
    if not isinstance(longest, int) or longest >= wanted:
        return []
    found = f"takes {longest} tokens, environments may send {wanted} (atropos.max_token_length)"
    return [warned(name, found, f"start it with --max-model-len {wanted}, or lower the setting")]


def _check_routes(name: str, client: _Client) -> CheckResult:
    try:
        missing = [
            route for route in _PUBLISH_ROUTES if client.get(route).status_code == httpx.codes.NOT_FOUND
        ]
    except AtroposClientError as error:
        return failed(name, _found(error), "look at the server's log")
    if missing:
        return failed(
            name,
            f"lacks the routes {', '.join(missing)}",
            "start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment",
        )
    return passed(name, "has every route that publishing needs")


def _check_environment_route(name: str, client: _Client) -> list[CheckResult]:
    """Whether environments of server_type vllm can sample from it with log-probs."""
    if client.get("/generate").status_code != httpx.codes.NOT_FOUND:
        return [passed(name, "has the route /generate that Atropos environments call")]
    return [
        warned(
            name,
            "has no route /generate, which environments of server_type vllm call",
            "stock vLLM lacks it; see docs/your-own-stack.md",
        )
    ]


def _check_tokenizer(
    name: str, client: _Client, served: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None
) -> list[CheckResult]:
    """Compare token ids of a text, where the server has a route for that."""
    if tokenizer is None:
        return []
    reply = client.post("/tokenize", {"model": served.get("id"), "prompt": _SAMPLE})
    if reply.status_code != httpx.codes.OK:
        return [warned(name, "has no route /tokenize", "make sure it serves the model that is trained")]
    if reply.json().get("tokens") == tokenizer.encode(_SAMPLE):
        return [passed(name, "tokenizes as the trainer does")]
    return [failed(name, "tokenizes differently from the trainer", "let both use the same tokenizer files")]

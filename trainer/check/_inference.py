"""An inference server: health, model, the routes that publishing needs, and its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx

from atropos_client import AtroposClientError
from schemas import printable
from schemas.inference import CollectiveRpcRequest
from trainer.check._result import CheckResult, failed, passed, warned
from trainer.config import TrainerConfig
from trainer.publish.engines.connection import ServerConnection, reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLE = "What is 17+4? Answer with one number.\nÄpfel — 猫 — def f(x): return x"

# Routes that publishing calls. A GET changes nothing: a route that takes POST answers 405, a missing one 404.
_PUBLISH_ROUTES = ("/pause", "/resume", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version")


Ask = Callable[..., httpx.Response]
"""Sends a request, as `ServerConnection.exchange` does, within the time for a connection."""


def check_inference_server(
    url: str, config: TrainerConfig, tokenizer: PreTrainedTokenizerBase | None
) -> list[CheckResult]:
    """Probe one server; changes nothing there."""
    name = f"inference {url}"
    results: list[CheckResult] = []
    try:
        connection = ServerConnection(url, token=config.publish.token, headers=config.publish.headers)
        with closing(connection):
            ask = partial(connection.exchange, seconds=config.atropos.connect_timeout)
            results += _probes(name, ask, config, tokenizer)
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
    name: str, ask: Ask, config: TrainerConfig, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[CheckResult]:
    ask("GET /health").raise_for_status()
    served = ask("GET /v1/models").raise_for_status().json()["data"][0]
    yield passed(name, f"healthy, serves {printable(str(served.get('id')))}")
    yield from _check_length(name, served, config)
    yield _check_routes(name, ask)
    yield from _check_environment_route(name, ask)
    yield from _check_tokenizer(name, ask, served, tokenizer)
    if config.publish.transport == "delta":
        yield _check_extension(name, ask)


def _check_length(name: str, served: dict[str, Any], config: TrainerConfig) -> list[CheckResult]:
    longest, wanted = served.get("max_model_len"), config.atropos.max_token_length
    if not isinstance(longest, int) or longest >= wanted:
        return []
    found = f"takes {longest} tokens, environments may send {wanted} (atropos.max_token_length)"
    return [warned(name, found, f"start it with --max-model-len {wanted}, or lower the setting")]


def _check_routes(name: str, ask: Ask) -> CheckResult:
    try:
        missing = [
            route for route in _PUBLISH_ROUTES if ask(f"GET {route}").status_code == httpx.codes.NOT_FOUND
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


def _check_extension(name: str, ask: Ask) -> CheckResult:
    """Whether its workers take deltas; whether they can read the files shows in a publish only."""
    request = CollectiveRpcRequest(method="atropos_delta_state")
    reply = ask("POST /collective_rpc", json=request.model_dump())
    if reply.is_success:
        return passed(name, "its workers take deltas; check --publish shows whether they can read the files")
    return warned(
        name,
        "its workers take no deltas, so that every version goes there whole, as a directory",
        "start vLLM with --worker-extension-cls atropos_delta.AtroposDelta and ATROPOS_DELTA_SOURCE; see "
        "docs/deltas.md",
    )


def _check_environment_route(name: str, ask: Ask) -> list[CheckResult]:
    """Whether environments of server_type vllm can sample from it with log-probs."""
    if ask("GET /generate").status_code != httpx.codes.NOT_FOUND:
        return [passed(name, "has the route /generate that Atropos environments call")]
    return [
        warned(
            name,
            "has no route /generate, which environments of server_type vllm call",
            "stock vLLM lacks it; see docs/your-own-stack.md",
        )
    ]


def _check_tokenizer(
    name: str, ask: Ask, served: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None
) -> list[CheckResult]:
    """Compare token ids of a text, where the server has a route for that."""
    if tokenizer is None:
        return []
    reply = ask("POST /tokenize", json={"model": served.get("id"), "prompt": _SAMPLE})
    if reply.status_code != httpx.codes.OK:
        return [warned(name, "has no route /tokenize", "make sure it serves the model that is trained")]
    if reply.json().get("tokens") == tokenizer.encode(_SAMPLE):
        return [passed(name, "tokenizes as the trainer does")]
    return [failed(name, "tokenizes differently from the trainer", "let both use the same tokenizer files")]

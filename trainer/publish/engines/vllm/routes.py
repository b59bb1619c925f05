"""Speaks to vLLM (0.32) over HTTP: its development-mode weight routes and its completions route."""

from __future__ import annotations

import time
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from schemas.inference import (
    CacheResetReply,
    CollectiveRpcReply,
    CollectiveRpcRequest,
    CompletionReply,
    CompletionRequest,
    DeltaDone,
    DeltaState,
    ModelList,
    PauseState,
    PromptLogProbs,
    WeightInfo,
    WeightVersionRequest,
    WorldSize,
)
from trainer.config import PublishSettings
from trainer.publish.engines.connection import Answer, Deadline
from trainer.publish.engines.vllm.adapters import AdapterRoutes
from trainer.publish.errors import Phase, ServerFailure
from trainer.publish.interfaces import NextToken

COMPLETIONS = "POST /v1/completions"

UNKNOWN_METHOD = (HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.NOT_FOUND, HTTPStatus.BAD_REQUEST)
"""Answers to an unknown method of the workers: of vLLM, without the route, of the embedded server."""

CONNECT_ROUTES = ("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine")
"""The steps of a weight transfer that only join or leave the group of those who transfer."""

DELTA_POLL_SECONDS = 0.05
"""Between two questions whether the workers have checked a file."""

LIKELIEST_TOKENS = 5
"""Number of tokens whose log-probs come with a generated token; servers allow 20."""

NEUTRAL_SAMPLING: dict[str, Any] = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Sent along, because a server may otherwise take its defaults from the model's generation_config.json."""

_ID_MARK = "token_id:"
"""vLLM puts it before the number of a token that it names by its number."""


class VllmRoutes(AdapterRoutes):
    """Speaks to one vLLM server, or one like it.

    Args:
        url: Its base URL.
        settings: Section `publish` of the configuration.
        served_model_name: The model's name there; None: the only one that it serves.
    """

    def __init__(self, url: str, settings: PublishSettings, *, served_model_name: str | None = None) -> None:
        super().__init__(url, settings)
        self._model_name = served_model_name

    def wait_until_ready(self) -> None:
        """Wait for `/health`, find the model's name in `/v1/models`, and wait until the engine answers.

        `/health` does not ask the engine: one that prepares its kernels for its first request, a minute on a
        busy CPU, answers `/is_paused` after that.
        """
        deadline = Deadline(self._settings.ready_timeout)
        self._connection.call("GET /health", Phase.READY, starting=True, deadline=deadline)
        models = self._connection.ask(ModelList, "GET /v1/models", Phase.READY, deadline=deadline)
        names = [card.id for card in models.data if card.parent is None]
        if self._model_name is None and len(names) == 1:
            self._model_name = names[0]
        if self._model_name not in names:
            wanted = self._model_name or "exactly one model"
            raise self.failure(Phase.READY, f"it serves {names}, and we look for {wanted}")
        self._ask_whether_paused(deadline=deadline)

    def is_paused(self) -> bool:
        """Ask `/is_paused`; a server without that route counts as running."""
        return self._ask_whether_paused()

    def _ask_whether_paused(self, deadline: Deadline | None = None) -> bool:
        state = self._connection.ask_if_known(PauseState, "GET /is_paused", Phase.READY, deadline=deadline)
        return state is not None and state.is_paused

    def pause(self) -> None:
        """Pause generation, in the mode that the configuration names."""
        self._connection.call("POST /pause", Phase.PAUSE, query={"mode": self._settings.pause_mode})

    def load_directory(self, path: Path, version: int) -> None:
        """Let every worker reload its weights from the directory."""
        body = CollectiveRpcRequest(method="reload_weights", kwargs={"weights_path": str(path.absolute())})
        self._connection.call("POST /collective_rpc", Phase.LOAD, body=body, once=True)

    def reset_caches(self) -> None:
        """Empty the prefix cache.

        Requests that a pause has frozen hold cache blocks, and vLLM refuses the reset while they do.
        They are therefore sent back to the queue: on resuming, the new weights compute their cache anew.
        """
        query = {"reset_running_requests": "true"}
        self._connection.ask(CacheResetReply, "POST /reset_prefix_cache", Phase.RESET_CACHES, query=query)

    def tag(self, version: int) -> None:
        """Set the label; without the route there is none, which is no failure."""
        body = WeightVersionRequest(new_version=str(version))
        self._connection.call_if_known("POST /update_weight_version", Phase.TAG, body=body)

    def resume(self) -> None:
        """Go on generating."""
        self._connection.call("POST /resume", Phase.RESUME)

    def score(self, token_id_lists: list[list[int]], *, served_name: str | None = None) -> list[list[float]]:
        """Score all probes with one request: prompt log-probs, and one generated token that is ignored."""
        request = CompletionRequest(
            model=served_name or self._model_name,
            prompt=token_id_lists,
            max_tokens=1,
            temperature=1.0,
            prompt_logprobs=0,
        )
        reply = self._complete(request)
        with self._connection.reading(COMPLETIONS, Phase.VERIFY):
            return _prompt_scores(reply, token_id_lists)

    def next_token(
        self, token_ids: list[int], *, temperature: float = 1.0, served_name: str | None = None
    ) -> NextToken:
        """Sample one token after a prompt, with its log-prob and those of the likeliest ones."""
        request = CompletionRequest(
            model=served_name or self._model_name,
            prompt=token_ids,
            max_tokens=1,
            temperature=temperature,
            logprobs=LIKELIEST_TOKENS,
            return_tokens_as_token_ids=True,
            **NEUTRAL_SAMPLING,
        )
        reply = self._complete(request)
        with self._connection.reading(COMPLETIONS, Phase.VERIFY):
            logprobs = _next_logprobs(reply)
        details = reply.usage.prompt_tokens_details
        return NextToken(logprobs=logprobs, cached_tokens=None if details is None else details.cached_tokens)

    def weight_version(self) -> str | None:
        """Read the label from `/weight_info`."""
        info = self._connection.ask_if_known(WeightInfo, "GET /weight_info", Phase.VERIFY)
        return None if info is None else info.weight_version

    def world_size(self) -> int:
        """Ask `/get_world_size` for the number of workers that take part in a transfer."""
        return self._connection.ask(WorldSize, "GET /get_world_size", Phase.CONNECT).world_size

    def weight_request(
        self, route: str, body: Mapping[str, Any] | None = None, *, seconds: float | None = None
    ) -> None:
        """Send one step of a weight transfer; once, because its other side runs beside it.

        An empty body is sent as no body: vLLM's routes then take their defaults. `seconds`: its deadline;
        None: that of loading.
        """
        phase = Phase.CONNECT if route in CONNECT_ROUTES else Phase.LOAD
        deadline = Deadline(seconds or self._settings.load_timeout)
        self._connection.call(f"POST {route}", phase, deadline=deadline, once=True, body=body or None)

    def delta_states(self) -> list[DeltaState] | None:
        """Ask each worker which version it holds; None where the workers have not our extension."""
        try:
            return self._ask_workers(DeltaState, "atropos_delta_state", Phase.READY)
        except ServerFailure as error:
            if error.status not in UNKNOWN_METHOD:
                raise
            return None

    def delta_prepare(self, name: str, sha256: str, size: int) -> list[DeltaState]:
        """Let the workers read and check a published file; return what they say when all of them have.

        Raises:
            PhaseDeadlineExceeded: They have not after `publish.load_timeout`.
        """
        deadline = Deadline(self._settings.load_timeout)
        wanted: dict[str, Any] = {"name": name, "sha256": sha256, "size": size}
        begin = "atropos_delta_prepare"
        while any(
            done.error for done in self._ask_workers(DeltaDone, begin, Phase.LOAD, wanted, deadline=deadline)
        ):
            time.sleep(DELTA_POLL_SECONDS)  # one that was given up is still being read
        while True:
            states = self._ask_workers(DeltaState, "atropos_delta_state", Phase.LOAD, deadline=deadline)
            if all(state.error is not None or state.ready == name for state in states):
                return states
            time.sleep(DELTA_POLL_SECONDS)

    def delta_apply(self, name: str) -> str | None:
        """Let the workers write the file that they have checked; return what failed, None if nothing did."""
        done = self._ask_workers(DeltaDone, "atropos_delta_apply", Phase.LOAD, {"name": name}, once=True)
        return next((each.error for each in done if each.error is not None), None)

    def _ask_workers(
        self,
        kind: type[Answer],
        method: str,
        phase: Phase,
        arguments: dict[str, Any] | None = None,
        *,
        deadline: Deadline | None = None,
        once: bool = False,
    ) -> list[Answer]:
        """Run a method of our extension on every worker."""
        route = "POST /collective_rpc"
        body = CollectiveRpcRequest(method=method, kwargs=arguments or {})
        reply = self._connection.ask(
            CollectiveRpcReply, route, phase, body=body, deadline=deadline, once=once
        )
        with self._connection.reading(f"{route} {method}", phase):
            return [kind.model_validate(each) for each in reply.results]

    def _complete(self, request: CompletionRequest) -> CompletionReply:
        return self._connection.ask(CompletionReply, COMPLETIONS, Phase.VERIFY, body=request)


def _prompt_scores(reply: CompletionReply, token_id_lists: list[list[int]]) -> list[list[float]]:
    """Pick the log-probs of the prompts' own tokens.

    Raises:
        ValueError: The reply does not speak of exactly these prompts and tokens.
    """
    choices = sorted(reply.choices, key=lambda choice: choice.index)
    if len(choices) != len(token_id_lists):
        raise ValueError(f"{len(choices)} choices for {len(token_id_lists)} prompts")
    return [
        _token_scores(choice.prompt_logprobs, token_ids, prompt=number)
        for number, (choice, token_ids) in enumerate(zip(choices, token_id_lists, strict=True))
    ]


def _token_scores(logprobs: PromptLogProbs | None, token_ids: list[int], *, prompt: int) -> list[float]:
    if logprobs is None:
        raise ValueError("the reply has no prompt_logprobs")
    if len(logprobs) != len(token_ids):
        raise ValueError(f"{len(logprobs)} prompt_logprobs for prompt {prompt} of {len(token_ids)} tokens")
    scores = []
    for position in range(1, len(token_ids)):
        entry = logprobs[position]
        token_id = token_ids[position]
        if entry is None or token_id not in entry:
            raise ValueError(f"prompt {prompt} has no log-prob for its token {token_id} at {position}")
        scores.append(entry[token_id].logprob)
    return scores


def _next_logprobs(reply: CompletionReply) -> dict[int, float]:
    """Return token ids and log-probs of the one generated token and of its likeliest rivals.

    Raises:
        ValueError: There is not exactly one, or its log-probs do not say which tokens they speak of.
    """
    logprobs = reply.choices[0].logprobs if len(reply.choices) == 1 else None
    if logprobs is None or len(logprobs.tokens) != 1 or len(logprobs.token_logprobs) != 1:
        raise ValueError("the reply has no log-probs of exactly one generated token")
    rivals = logprobs.top_logprobs[0] if logprobs.top_logprobs else None
    named = {**(rivals or {}), logprobs.tokens[0]: logprobs.token_logprobs[0]}
    found: dict[int, float] = {}
    for name, logprob in named.items():
        token_id = name.removeprefix(_ID_MARK)
        if token_id == name or not token_id.isdecimal() or logprob is None:
            raise ValueError(f"the log-prob of {name!r} is {logprob}, and token_id:<number> was asked for")
        found[int(token_id)] = logprob
    return found

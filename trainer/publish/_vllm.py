"""The dialect of vLLM's HTTP server (0.32): its development-mode weight routes and its completions route."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, TypeVar

from pydantic import BaseModel

from schemas.inference import (
    CacheResetReply,
    CollectiveRpcRequest,
    CompletionReply,
    CompletionRequest,
    ModelList,
    PauseState,
    PromptLogProbs,
    WeightInfo,
    WeightVersionRequest,
    WorldSize,
)
from trainer.config import PublishSettings
from trainer.publish._http import Deadline, ServerConnection
from trainer.publish._protocol import NextToken, StagedWeights
from trainer.publish._retry import Repeatability
from trainer.publish._vllm_adapters import VllmAdapters
from trainer.publish.errors import LoadFailed, Phase, ScoringFailed, ServerFailure, ServerNotReady

logger = logging.getLogger(__name__)

CONNECT_ROUTES = ("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine")
"""The steps of a weight transfer that only join or leave the group of those who transfer."""

LIKELIEST_TOKENS = 5
"""How many tokens' log-probs a generated token comes with; servers allow 20."""

NEUTRAL_SAMPLING: dict[str, Any] = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Sent along, because a server may otherwise take its defaults from the model's generation_config.json."""

_ID_MARK = "token_id:"
"""vLLM puts it before the number of a token that it names by its number."""

Reply = TypeVar("Reply", bound=BaseModel)


class VllmRoutes(VllmAdapters):
    """One vLLM server, or one that speaks like it."""

    def __init__(self, url: str, settings: PublishSettings, *, served_model_name: str | None = None) -> None:
        super().__init__()
        self._connection = ServerConnection(url, token=settings.token, headers=settings.headers)
        self._settings = settings
        self._model_name = served_model_name

    @property
    def url(self) -> str:
        """Base URL without credentials."""
        return self._connection.url

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()

    def wait_until_ready(self) -> None:
        """Wait for `/health`, find the model's name in `/v1/models`, and wait until the engine answers.

        `/health` does not ask the engine: one that prepares its kernels for its first request, a minute on a
        busy CPU, answers `/is_paused` after that.
        """
        deadline = Deadline(self._settings.ready_timeout)
        self._connection.call(
            "GET",
            "/health",
            phase=Phase.READY,
            version=None,
            deadline=deadline,
            repeatability=Repeatability.STARTUP,
        )
        models = self._get("/v1/models", ModelList, phase=Phase.READY, version=None, deadline=deadline)
        names = [card.id for card in models.data if card.parent is None]
        if self._model_name is None and len(names) == 1:
            self._model_name = names[0]
        if self._model_name not in names:
            raise ServerNotReady(
                f"it serves {names}, and we look for {self._model_name or 'exactly one model'}",
                server=self.url,
                phase=Phase.READY,
            )
        self._ask_whether_paused(deadline)

    def is_paused(self) -> bool:
        """Ask `/is_paused`; a server without that route counts as running."""
        return self._ask_whether_paused(Deadline(self._settings.pause_timeout))

    def _ask_whether_paused(self, deadline: Deadline) -> bool:
        try:
            state = self._get("/is_paused", PauseState, phase=Phase.READY, version=None, deadline=deadline)
        except ServerNotReady as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return False
            raise
        return state.is_paused

    def pause(self, version: int) -> None:
        """Pause generation, in the mode that the configuration names."""
        self._post(
            "/pause",
            phase=Phase.PAUSE,
            version=version,
            seconds=self._settings.pause_timeout,
            query={"mode": self._settings.pause_mode},
        )

    def load_directory(self, staged: StagedWeights) -> None:
        """Let every worker reload its weights from the directory."""
        if staged.path is None:
            raise LoadFailed(
                "this version was not written to a directory",
                server=self.url,
                phase=Phase.LOAD,
                version=staged.version,
            )
        request = CollectiveRpcRequest(
            method="reload_weights", kwargs={"weights_path": str(staged.path.absolute())}
        )
        self._post(
            "/collective_rpc",
            phase=Phase.LOAD,
            version=staged.version,
            seconds=self._settings.load_timeout,
            body=request,
            repeatability=Repeatability.ONCE,
        )

    def reset_caches(self, version: int) -> None:
        """Empty the prefix cache.

        Requests that a pause has frozen hold cache blocks, and vLLM refuses the reset while they do.
        They are therefore sent back to the queue: on resuming, the new weights compute their cache anew.
        """
        content = self._post(
            "/reset_prefix_cache",
            phase=Phase.RESET_CACHES,
            version=version,
            seconds=self._settings.pause_timeout,
            query={"reset_running_requests": "true"},
        )
        if content.strip():  # vLLM before 0.12 answered with an empty body
            self._connection.parse(content, CacheResetReply, phase=Phase.RESET_CACHES, version=version)

    def tag(self, version: int) -> None:
        """Set the label; without the route there is none, which is no failure."""
        try:
            self._post(
                "/update_weight_version",
                phase=Phase.TAG,
                version=version,
                seconds=self._settings.pause_timeout,
                body=WeightVersionRequest(new_version=str(version)),
            )
        except ServerFailure as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            logger.info("%s has no route for version labels; verification does not need them", self.url)

    def resume(self, version: int | None) -> None:
        """Go on generating. `version` is for messages; None outside a publish."""
        self._post("/resume", phase=Phase.RESUME, version=version, seconds=self._settings.pause_timeout)

    def score(
        self, token_id_lists: list[list[int]], version: int, *, served_name: str | None = None
    ) -> list[list[float]]:
        """Score all probes with one request: prompt log-probs, and one generated token that is ignored."""
        request = CompletionRequest(
            model=served_name or self._model_name,
            prompt=token_id_lists,
            max_tokens=1,
            temperature=1.0,
            prompt_logprobs=0,
        )
        content = self._post(
            "/v1/completions",
            phase=Phase.VERIFY,
            version=version,
            seconds=self._settings.verify_timeout,
            body=request,
        )
        reply = self._connection.parse(content, CompletionReply, phase=Phase.VERIFY, version=version)
        try:
            return _prompt_scores(reply, token_id_lists)
        except ValueError as error:
            raise ScoringFailed(
                f"POST /v1/completions: {error}", server=self.url, phase=Phase.VERIFY, version=version
            ) from error

    def next_token(
        self,
        token_ids: list[int],
        version: int,
        *,
        temperature: float = 1.0,
        served_name: str | None = None,
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
        content = self._post(
            "/v1/completions",
            phase=Phase.VERIFY,
            version=version,
            seconds=self._settings.verify_timeout,
            body=request,
        )
        reply = self._connection.parse(content, CompletionReply, phase=Phase.VERIFY, version=version)
        try:
            logprobs = _next_logprobs(reply)
        except ValueError as error:
            raise ScoringFailed(
                f"POST /v1/completions: {error}", server=self.url, phase=Phase.VERIFY, version=version
            ) from error
        details = reply.usage.prompt_tokens_details
        return NextToken(logprobs=logprobs, cached_tokens=None if details is None else details.cached_tokens)

    def weight_version(self, version: int) -> str | None:
        """Read the label from `/weight_info`."""
        deadline = Deadline(self._settings.verify_timeout)
        try:
            info = self._get(
                "/weight_info", WeightInfo, phase=Phase.VERIFY, version=version, deadline=deadline
            )
        except ScoringFailed as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return None
            raise
        return info.weight_version

    def world_size(self, version: int | None) -> int:
        """Ask `/get_world_size` for the number of workers. `version` is for messages."""
        deadline = Deadline(self._settings.pause_timeout)
        reply = self._get(
            "/get_world_size", WorldSize, phase=Phase.CONNECT, version=version, deadline=deadline
        )
        return reply.world_size

    def weight_request(self, route: str, body: Mapping[str, Any], version: int | None) -> None:
        """One step of a weight transfer; sent once, because its other side runs beside it.

        An empty body is sent as no body: vLLM's routes then take their defaults.
        """
        self._connection.call(
            "POST",
            route,
            phase=Phase.CONNECT if route in CONNECT_ROUTES else Phase.LOAD,
            version=version,
            deadline=Deadline(self._settings.load_timeout),
            repeatability=Repeatability.ONCE,
            body=dict(body) or None,
        )

    def _get(
        self, path: str, kind: type[Reply], *, phase: Phase, version: int | None, deadline: Deadline
    ) -> Reply:
        content = self._connection.call(
            "GET",
            path,
            phase=phase,
            version=version,
            deadline=deadline,
            repeatability=Repeatability.IDEMPOTENT,
        )
        return self._connection.parse(content, kind, phase=phase, version=version)

    def _post(
        self,
        path: str,
        *,
        phase: Phase,
        version: int | None,
        seconds: float,
        body: BaseModel | None = None,
        query: dict[str, str] | None = None,
        repeatability: Repeatability = Repeatability.IDEMPOTENT,
    ) -> bytes:
        return self._connection.call(
            "POST",
            path,
            phase=phase,
            version=version,
            deadline=Deadline(seconds),
            repeatability=repeatability,
            body=None if body is None else body.model_dump(mode="json", exclude_unset=True),
            query=query,
        )


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
    """Token ids and log-probs of the one generated token and of its likeliest rivals.

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

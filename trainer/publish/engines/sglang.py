"""Speaks to SGLang (0.5.23) over HTTP: its native routes. Not yet run against a real SGLang.

What is different from vLLM:

- A pause holds back new requests, that of `/health` included: a paused server that is asked calls itself
  unhealthy after 20 seconds.
- No pause waits for requests to end. Loading without any pause does: it takes a lock that every request
  shares until it has ended. So `publish.pause_mode: wait` sends no pause at all.
- `in_place` leaves the keys and values of requests in flight as old weights computed them, and the prefix
  cache cannot be emptied meanwhile. It is never used; `keep` is `retract`.
- Status 400 stands for requests that it does not understand and for work that went wrong.
- It uses an adapter only where a request names one, and environments name none: it takes none.
"""

from __future__ import annotations

from http import HTTPStatus
from pathlib import Path

from schemas import sglang as wire
from trainer.publish.engines.connection import Deadline
from trainer.publish.errors import Phase, ServerFailure
from trainer.publish.interfaces import InferenceServer, NextToken

GENERATE = "POST /generate"

IDLE_SECONDS = 10.0
"""Seconds that emptying the cache may wait for the scheduler to be done with requests that a pause ended."""

PAUSE_MODES: dict[str, wire.PauseMode] = {"keep": "retract", "abort": "abort"}
"""`publish.pause_mode` in SGLang's words; `wait` is no pause."""

LIKELIEST_TOKENS = 5
"""Number of tokens whose log-probs come with a generated token."""

REMEDIES: dict[Phase | int, str] = {
    HTTPStatus.UNAUTHORIZED: (
        "set publish.token to the server's --api-key; with --admin-api-key, to that one, and give --api-key "
        "the same value or none: the weight routes take the one, /generate the other"
    ),
    Phase.READY: (
        "see that SGLang runs at this URL (publish.engine says which engine it is); raise "
        "publish.ready_timeout if it is only slow to start"
    ),
    Phase.PAUSE: "look into the server's log",
    Phase.RESUME: (
        "POST /continue_generation with the body {} to the server by hand, or restart it: until then "
        "environments wait for it"
    ),
    Phase.VERIFY: (
        "verification needs POST /generate with input_ids and return_logprob; see the server's log, or set "
        "publish.verify to false to go on without proof"
    ),
}
"""Where what to do is not what it would be with vLLM."""


class SglangRoutes(InferenceServer):
    """Speaks to one SGLang server. Its routes take no model name."""

    remedies = REMEDIES

    def wait_until_ready(self) -> None:
        """Wait until it answers; go on generating if it was left paused; wait until it is healthy."""
        deadline = Deadline(self._settings.ready_timeout)
        info = self._connection.ask(
            wire.ModelInfo, "GET /model_info", Phase.READY, starting=True, deadline=deadline
        )
        if not info.is_generation:
            found = f"{info.model_path} is served for embeddings, not for generation"
            raise self.failure(Phase.READY, found)
        if self._readiness(deadline=deadline) is not HTTPStatus.OK:
            # Starting, unhealthy or paused: it does not say which. Only the last needs it, the others do not
            # mind. It must come before /health, which waits for a token that a paused server does not give.
            go_on = wire.ContinueRequest()
            self._connection.ask(
                wire.StatusReply, "POST /continue_generation", Phase.READY, body=go_on, deadline=deadline
            )
            self._connection.call("GET /health", Phase.READY, starting=True, deadline=deadline)
        server = self._connection.ask(wire.ServerInfo, "GET /server_info", Phase.READY, deadline=deadline)
        # Refused, because it would only show later, now and then, as wrong labels or stale blocks.
        unfit = ""
        if server.tokenizer_worker_num != 1:
            unfit = (
                f"--tokenizer-worker-num {server.tokenizer_worker_num}: each has a version label of its own"
            )
        elif server.hicache_storage_backend is not None:
            unfit = f"--hicache-storage-backend {server.hicache_storage_backend}: it is never emptied"
        if unfit:
            raise self.failure(Phase.READY, f"it was started with {unfit}", remedy="start it without")

    def is_paused(self) -> bool:
        """Ask `/ready`; one that is unhealthy counts as paused, one without that route as running."""
        return self._readiness() is HTTPStatus.SERVICE_UNAVAILABLE

    def pause(self) -> None:
        """Pause generation: `keep` retracts, `abort` aborts; with `wait` it is loading that waits."""
        mode = PAUSE_MODES.get(self._settings.pause_mode)
        if mode is not None:
            body = wire.PauseRequest(mode=mode)
            self._connection.ask(wire.StatusReply, "POST /pause_generation", Phase.PAUSE, body=body)

    def load_directory(self, path: Path, version: int) -> None:
        """Let every worker load its weights from the directory."""
        # Where there is a pause, emptying the cache and the label are steps of their own.
        at_once = self._settings.pause_mode == "wait"
        body = wire.DiskUpdateRequest(
            model_path=str(path.absolute()),
            flush_cache=at_once,
            weight_version=str(version) if at_once else None,
        )
        route = "POST /update_weights_from_disk"
        self._connection.ask(wire.OperationReply, route, Phase.LOAD, body=body, once=True)

    def reset_caches(self) -> None:
        """Empty the prefix cache.

        Retracted requests wait in the queue, and SGLang empties the cache all the same if it is asked to do
        so at once; told to wait, it would wait for the queue to empty. After an abort it is the other way
        round: the last step may still be in the scheduler.
        """
        if self._settings.pause_mode == "wait":  # done while loading: by now requests are running again
            return
        aborted = self._settings.pause_mode == "abort"
        wait = min(IDLE_SECONDS, self._settings.pause_timeout / 2) if aborted else 0.0
        try:
            self._connection.call("POST /flush_cache", Phase.RESET_CACHES, query={"timeout": f"{wait:g}"})
        except ServerFailure as error:
            if error.status == HTTPStatus.BAD_REQUEST:  # understood, and refused for now
                error.status = None
            raise

    def tag(self, version: int) -> None:
        """Set the label; without the route there is none, which is no failure."""
        body = wire.WeightVersionRequest(new_version=str(version), abort_all_requests=False)
        route = "POST /update_weight_version"
        self._connection.ask_if_known(wire.OperationReply, route, Phase.TAG, body=body)

    def resume(self) -> None:
        """Go on generating."""
        body = wire.ContinueRequest()
        self._connection.ask(wire.StatusReply, "POST /continue_generation", Phase.RESUME, body=body)

    def weight_version(self) -> str | None:
        """Read the label from `/model_info`."""
        return self._connection.ask(wire.ModelInfo, "GET /model_info", Phase.VERIFY).weight_version

    def score(self, token_id_lists: list[list[int]], *, served_name: str | None = None) -> list[list[float]]:
        """Score all probes with one request: prompt log-probs, and one generated token that is ignored.

        Prompts that are scored from their start are computed from their start: nothing cached is used.
        """
        request = wire.GenerateRequest(
            input_ids=token_id_lists,
            sampling_params=one_token(1.0),
            return_logprob=True,
            logprob_start_len=0,
        )
        replies = self._connection.ask(wire.GenerateReplies, GENERATE, Phase.VERIFY, body=request).root
        with self._connection.reading(GENERATE, Phase.VERIFY):
            if len(replies) != len(token_id_lists):
                raise ValueError(f"{len(replies)} replies for {len(token_id_lists)} prompts")
            return [
                prompt_scores(reply.meta_info, token_ids, prompt=number)
                for number, (reply, token_ids) in enumerate(zip(replies, token_id_lists, strict=True))
            ]

    def next_token(
        self, token_ids: list[int], *, temperature: float = 1.0, served_name: str | None = None
    ) -> NextToken:
        """Sample one token after a prompt, with its log-prob and those of the likeliest ones."""
        request = wire.GenerateRequest(
            input_ids=token_ids,
            sampling_params=one_token(temperature),
            return_logprob=True,
            top_logprobs_num=LIKELIEST_TOKENS,
        )
        meta = self._connection.ask(wire.GenerateReply, GENERATE, Phase.VERIFY, body=request).meta_info
        with self._connection.reading(GENERATE, Phase.VERIFY):
            return NextToken(logprobs=next_logprobs(meta), cached_tokens=meta.cached_tokens)

    def _readiness(self, deadline: Deadline | None = None) -> HTTPStatus:
        """Ask `/ready`: 200, 503 (starting, unhealthy or paused), or 404 (SGLang has it not yet)."""
        try:
            self._connection.call("GET /ready", Phase.READY, once=True, deadline=deadline)
        except ServerFailure as error:
            if error.status in (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.NOT_FOUND):
                return HTTPStatus(error.status)
            raise
        return HTTPStatus.OK


def one_token(temperature: float) -> wire.SamplingParameters:
    """Name every parameter: a server may have defaults of its own (--preferred-sampling-params)."""
    return wire.SamplingParameters(
        max_new_tokens=1,
        temperature=temperature,
        top_p=1.0,
        top_k=-1,
        min_p=0.0,
        frequency_penalty=0.0,
        presence_penalty=0.0,
        repetition_penalty=1.0,
        ignore_eos=True,
    )


def prompt_scores(meta: wire.MetaInfo, token_ids: list[int], *, prompt: int) -> list[float]:
    """Pick the log-probs of a prompt's own tokens.

    Raises:
        ValueError: The reply does not speak of exactly these tokens.
    """
    entries = meta.input_token_logprobs
    if entries is None:
        raise ValueError("the reply has no input_token_logprobs")
    if len(entries) != len(token_ids):
        raise ValueError(f"{len(entries)} log-probs for prompt {prompt} of {len(token_ids)} tokens")
    scores = []
    for position in range(1, len(token_ids)):
        entry, token_id = entries[position], token_ids[position]
        # SGLang reports ids at the very end of the vocabulary as 0.
        if entry.logprob is None or entry.token_id not in (token_id, 0):
            raise ValueError(
                f"prompt {prompt} has {entry.logprob} for token {entry.token_id} at {position}, where its "
                f"token {token_id} was to be scored"
            )
        scores.append(entry.logprob)
    return scores


def next_logprobs(meta: wire.MetaInfo) -> dict[int, float]:
    """Return token ids and log-probs of the one generated token and of its likeliest rivals.

    Raises:
        ValueError: There is not exactly one, or a log-prob is missing.
    """
    sampled = meta.output_token_logprobs or []
    if len(sampled) != 1:
        raise ValueError(f"{len(sampled)} log-probs of one generated token")
    rivals = (meta.output_top_logprobs or [None])[0] or []
    found: dict[int, float] = {}
    for entry in (*rivals, *sampled):
        if entry.logprob is None:
            raise ValueError(f"no log-prob for token {entry.token_id}")
        found[entry.token_id] = entry.logprob
    return found

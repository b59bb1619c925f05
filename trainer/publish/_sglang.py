"""The dialect of SGLang's HTTP server (0.5.23): its native routes.

What is different from vLLM:

- A pause holds back new requests, that of `/health` included: a paused server that is asked calls itself
  unhealthy after 20 seconds.
- No pause waits for requests to end. Loading without any pause does: it takes a lock that every request
  shares until it has ended. So `publish.pause_mode: wait` sends no pause at all.
- `in_place` leaves the keys and values of requests in flight as old weights computed them, and the prefix
  cache cannot be emptied meanwhile. It is never used; `keep` is `retract`.
- Status 400 stands for requests that it does not understand and for work that went wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel

from schemas import sglang as wire
from trainer.config import PublishSettings
from trainer.publish._http import Deadline, ServerConnection
from trainer.publish._protocol import NextToken, StagedWeights
from trainer.publish._retry import Repeatability
from trainer.publish._sglang_replies import (
    LIKELIEST_TOKENS,
    REMEDIES,
    in_sglangs_terms,
    next_logprobs,
    one_token,
    prompt_scores,
)
from trainer.publish.errors import (
    ConnectFailed,
    LoadFailed,
    Phase,
    ScoringFailed,
    ServerFailure,
    ServerNotReady,
)

logger = logging.getLogger(__name__)

CONNECT_ROUTES = ("/init_weights_update_group", "/destroy_weights_update_group")
"""The steps of a weight transfer that only join or leave the group."""

IDLE_SECONDS = 10.0
"""How long emptying the cache may wait until the scheduler is done with requests that a pause has ended."""

PAUSE_MODES: dict[str, wire.PauseMode] = {"keep": "retract", "abort": "abort"}
"""`publish.pause_mode` in SGLang's words; `wait` is no pause."""

Reply = TypeVar("Reply", bound=BaseModel)


class SglangRoutes:
    """One SGLang server.

    Args:
        url: Its base URL.
        settings: Section `publish` of the configuration.
        served_model_name: Not used: SGLang's native routes take no model name.
    """

    def __init__(self, url: str, settings: PublishSettings, *, served_model_name: str | None = None) -> None:
        self._connection = ServerConnection(url, token=settings.token, headers=settings.headers)
        self._settings = settings

    @property
    def url(self) -> str:
        """Base URL without credentials."""
        return self._connection.url

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()

    # --- state ------------------------------------------------------------------------------------

    def wait_until_ready(self) -> None:
        """Wait until it answers; go on generating if it was left paused; wait until it is healthy."""
        deadline = Deadline(self._settings.ready_timeout)
        where: dict[str, Any] = {"phase": Phase.READY, "version": None, "deadline": deadline}
        info = self._get("/model_info", wire.ModelInfo, repeatability=Repeatability.STARTUP, **where)
        if not info.is_generation:
            raise ServerNotReady(
                f"{info.model_path} is served for embeddings, not for generation",
                server=self.url,
                phase=Phase.READY,
                remedy=REMEDIES[Phase.READY],
            )
        if self._readiness(deadline) is not HTTPStatus.OK:
            # Starting, unhealthy or paused: it does not say which. Only the last needs it, the others do not
            # mind. It must come before /health, which waits for a token that a paused server does not give.
            self._post("/continue_generation", wire.ContinueRequest(), wire.StatusReply, **where)
            self._call("GET", "/health", repeatability=Repeatability.STARTUP, **where)
        self._refuse_unfit(self._get("/server_info", wire.ServerInfo, **where))

    def is_paused(self) -> bool:
        """Ask `/ready`; one that is unhealthy counts as paused, one without that route as running."""
        return self._readiness(Deadline(self._settings.pause_timeout)) is HTTPStatus.SERVICE_UNAVAILABLE

    def pause(self, version: int) -> None:
        """Pause generation: `keep` retracts, `abort` aborts; with `wait` it is loading that waits."""
        mode = PAUSE_MODES.get(self._settings.pause_mode)
        if mode is not None:
            self._post(
                "/pause_generation",
                wire.PauseRequest(mode=mode),
                wire.StatusReply,
                phase=Phase.PAUSE,
                version=version,
                deadline=Deadline(self._settings.pause_timeout),
            )

    def reset_caches(self, version: int) -> None:
        """Empty the prefix cache.

        Retracted requests wait in the queue, and SGLang empties the cache all the same if it is asked to do
        so at once; told to wait, it would wait for the queue to empty. After an abort it is the other way
        round: the last step may still be in the scheduler.
        """
        if self._settings.pause_mode == "wait":  # done while loading: by now requests are running again
            return
        seconds = self._settings.pause_timeout
        wait = min(IDLE_SECONDS, seconds / 2) if self._settings.pause_mode == "abort" else 0.0
        self._call(
            "POST",
            "/flush_cache",
            phase=Phase.RESET_CACHES,
            version=version,
            deadline=Deadline(seconds),
            query={"timeout": f"{wait:g}"},
        )

    def tag(self, version: int) -> None:
        """Set the label; without the route there is none, which is no failure."""
        try:
            self._post(
                "/update_weight_version",
                wire.WeightVersionRequest(new_version=str(version), abort_all_requests=False),
                wire.OperationReply,
                phase=Phase.TAG,
                version=version,
                deadline=Deadline(self._settings.pause_timeout),
            )
        except ServerFailure as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            logger.info("%s has no route for version labels; verification does not need them", self.url)

    def resume(self, version: int | None) -> None:
        """Go on generating. `version` is for messages; None outside a publish."""
        self._post(
            "/continue_generation",
            wire.ContinueRequest(),
            wire.StatusReply,
            phase=Phase.RESUME,
            version=version,
            deadline=Deadline(self._settings.pause_timeout),
        )

    def weight_version(self, version: int) -> str | None:
        """Read the label from `/model_info`."""
        deadline = Deadline(self._settings.verify_timeout)
        info = self._get(
            "/model_info", wire.ModelInfo, phase=Phase.VERIFY, version=version, deadline=deadline
        )
        return info.weight_version

    # --- weights ----------------------------------------------------------------------------------

    def load_directory(self, staged: StagedWeights) -> None:
        """Let every worker load its weights from the directory."""
        if staged.path is None:
            raise LoadFailed(
                "this version was not written to a directory",
                server=self.url,
                phase=Phase.LOAD,
                version=staged.version,
            )
        # Where there is a pause, emptying the cache and the label are steps of their own.
        at_once = self._settings.pause_mode == "wait"
        request = wire.DiskUpdateRequest(
            model_path=str(staged.path.absolute()),
            flush_cache=at_once,
            weight_version=str(staged.version) if at_once else None,
        )
        self._post(
            "/update_weights_from_disk",
            request,
            wire.OperationReply,
            phase=Phase.LOAD,
            version=staged.version,
            deadline=Deadline(self._settings.load_timeout),
            repeatability=Repeatability.ONCE,
        )

    def world_size(self, version: int | None) -> int:
        """Number of workers that share the model. `version` is for messages.

        Raises:
            ConnectFailed: SGLang does not take weights from a group in this arrangement of workers.
        """
        deadline = Deadline(self._settings.pause_timeout)
        server = self._get(
            "/server_info", wire.ServerInfo, phase=Phase.CONNECT, version=version, deadline=deadline
        )
        if server.dp_size != 1 or server.pp_size != 1:
            raise ConnectFailed(
                f"it was started with --dp-size {server.dp_size} and --pp-size {server.pp_size}, and takes "
                "weights from a process group only with 1 and 1",
                server=self.url,
                phase=Phase.CONNECT,
                version=version,
                remedy="start a server of its own for each copy of the model, or use publish.transport disk",
            )
        return server.tp_size

    def weight_request(self, route: str, body: Mapping[str, Any], version: int | None) -> None:
        """One step of a weight transfer; sent once, because its other side runs beside it."""
        phase = Phase.CONNECT if route in CONNECT_ROUTES else Phase.LOAD
        content = self._call(
            "POST",
            route,
            phase=phase,
            version=version,
            deadline=Deadline(self._settings.load_timeout),
            repeatability=Repeatability.ONCE,
            body=dict(body),
        )
        self._parse(content, wire.OperationReply, f"POST {route}", phase=phase, version=version)

    # --- generation -------------------------------------------------------------------------------

    def score(
        self, token_id_lists: list[list[int]], version: int, *, served_name: str | None = None
    ) -> list[list[float]]:
        """Score all probes with one request: prompt log-probs, and one generated token that is ignored.

        Prompts that are scored from their start are computed from their start: nothing cached is used.
        """
        if served_name is not None:
            self._no_adapters(Phase.VERIFY, version)
        request = wire.GenerateRequest(
            input_ids=token_id_lists,
            sampling_params=one_token(1.0),
            return_logprob=True,
            logprob_start_len=0,
        )
        replies = self._generate(request, wire.GenerateReplies, version).root
        with self._reading(version):
            if len(replies) != len(token_id_lists):
                raise ValueError(f"{len(replies)} replies for {len(token_id_lists)} prompts")
            return [
                prompt_scores(reply.meta_info, token_ids, prompt=number)
                for number, (reply, token_ids) in enumerate(zip(replies, token_id_lists, strict=True))
            ]

    def next_token(
        self,
        token_ids: list[int],
        version: int,
        *,
        temperature: float = 1.0,
        served_name: str | None = None,
    ) -> NextToken:
        """Sample one token after a prompt, with its log-prob and those of the likeliest ones."""
        if served_name is not None:
            self._no_adapters(Phase.VERIFY, version)
        request = wire.GenerateRequest(
            input_ids=token_ids,
            sampling_params=one_token(temperature),
            return_logprob=True,
            top_logprobs_num=LIKELIEST_TOKENS,
        )
        reply = self._generate(request, wire.GenerateReply, version)
        with self._reading(version):
            return NextToken(
                logprobs=next_logprobs(reply.meta_info), cached_tokens=reply.meta_info.cached_tokens
            )

    # --- adapters ---------------------------------------------------------------------------------

    def takes_adapters(self) -> bool:
        """No: SGLang uses an adapter where a request names it, and environments name none."""
        return False

    def adapters(self, version: int) -> set[str]:
        """Not for SGLang."""
        self._no_adapters(Phase.VERIFY, version)

    def load_adapter(self, name: str, path: Path, version: int) -> None:
        """Not for SGLang."""
        self._no_adapters(Phase.LOAD, version)

    def active_adapter(self, version: int) -> str | None:
        """Not for SGLang."""
        self._no_adapters(Phase.VERIFY, version)

    def activate_adapter(self, name: str, version: int) -> None:
        """Not for SGLang."""
        self._no_adapters(Phase.ACTIVATE, version)

    def use_model_itself(self) -> None:
        """SGLang's `/generate` samples from the model unless a request names an adapter."""

    def unload_adapter(self, name: str, version: int) -> None:
        """Not for SGLang."""
        self._no_adapters(Phase.ACTIVATE, version)

    def _no_adapters(self, phase: Phase, version: int) -> NoReturn:
        raise ServerFailure(
            "adapters cannot be published to SGLang: it uses one only where a request names it, and "
            "environments name none",
            server=self.url,
            phase=phase,
            version=version,
            remedy="use publish.lora_fallback merged, or publish.transport disk",
        )

    # --- requests ---------------------------------------------------------------------------------

    def _refuse_unfit(self, server: wire.ServerInfo) -> None:
        """Refuse what would only show later, now and then, as wrong labels or stale blocks."""
        found = None
        if server.tokenizer_worker_num != 1:
            found = (
                f"--tokenizer-worker-num {server.tokenizer_worker_num}, and each of these processes keeps a "
                "version label of its own"
            )
        if server.hicache_storage_backend is not None:
            found = (
                f"--hicache-storage-backend {server.hicache_storage_backend}, and emptying the cache leaves "
                "there what old weights computed"
            )
        if found is not None:
            raise ServerNotReady(
                f"it was started with {found}",
                server=self.url,
                phase=Phase.READY,
                remedy="start it without",
            )

    def _readiness(self, deadline: Deadline) -> HTTPStatus:
        """What `/ready` answers: 200, 503 (starting, unhealthy or paused), or 404 (SGLang has it not yet)."""
        try:
            self._call(
                "GET",
                "/ready",
                phase=Phase.READY,
                version=None,
                deadline=deadline,
                repeatability=Repeatability.ONCE,
            )
        except ServerNotReady as error:
            if error.status in (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.NOT_FOUND):
                return HTTPStatus(error.status)
            raise
        return HTTPStatus.OK

    def _generate(self, request: wire.GenerateRequest, kind: type[Reply], version: int) -> Reply:
        return self._post(
            "/generate",
            request,
            kind,
            phase=Phase.VERIFY,
            version=version,
            deadline=Deadline(self._settings.verify_timeout),
        )

    @contextmanager
    def _reading(self, version: int) -> Iterator[None]:
        """Turn what is wrong with a reply's numbers into the phase's error."""
        try:
            yield
        except ValueError as error:
            raise ScoringFailed(
                f"POST /generate: {error}",
                server=self.url,
                phase=Phase.VERIFY,
                version=version,
                remedy=REMEDIES[Phase.VERIFY],
            ) from error

    def _get(
        self,
        path: str,
        kind: type[Reply],
        *,
        phase: Phase,
        version: int | None,
        deadline: Deadline,
        repeatability: Repeatability = Repeatability.IDEMPOTENT,
    ) -> Reply:
        content = self._call(
            "GET", path, phase=phase, version=version, deadline=deadline, repeatability=repeatability
        )
        return self._parse(content, kind, f"GET {path}", phase=phase, version=version)

    def _post(
        self,
        path: str,
        body: BaseModel,
        kind: type[Reply],
        *,
        phase: Phase,
        version: int | None,
        deadline: Deadline,
        repeatability: Repeatability = Repeatability.IDEMPOTENT,
    ) -> Reply:
        content = self._call(
            "POST",
            path,
            phase=phase,
            version=version,
            deadline=deadline,
            repeatability=repeatability,
            body=body.model_dump(mode="json", exclude_unset=True),
        )
        return self._parse(content, kind, f"POST {path}", phase=phase, version=version)

    def _call(
        self,
        method: Literal["GET", "POST"],
        path: str,
        *,
        phase: Phase,
        version: int | None,
        deadline: Deadline,
        repeatability: Repeatability = Repeatability.IDEMPOTENT,
        body: Any = None,
        query: dict[str, str] | None = None,
    ) -> bytes:
        try:
            return self._connection.call(
                method,
                path,
                phase=phase,
                version=version,
                deadline=deadline,
                repeatability=repeatability,
                body=body,
                query=query,
            )
        except ServerFailure as error:
            raise in_sglangs_terms(error) from error

    def _parse(
        self, content: bytes, kind: type[Reply], request: str, *, phase: Phase, version: int | None
    ) -> Reply:
        try:
            return self._connection.parse(content, kind, phase=phase, version=version)
        except ServerFailure as error:
            raise in_sglangs_terms(error, request=request) from error

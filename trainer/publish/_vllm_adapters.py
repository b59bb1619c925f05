"""Adapters on a vLLM server: its runtime LoRA routes, and our middleware's `/atropos/adapter`.

vLLM 0.32, as measured: unloading takes the name away and nothing else; requests in flight go on to their
end. While they do, the engine reads the adapter's directory again whenever another adapter has pushed it out
of memory (with `--max-loras 1`: every time one is loaded). If the directory is gone by then, the whole engine
dies. So `adapters` also names those that requests still sample from, and whoever deletes a directory has to
ask. The prefix cache knows an adapter by its name and path: both loaded again with other content get the old
content's blocks.
"""

from __future__ import annotations

import logging
import re
from http import HTTPStatus
from pathlib import Path

from pydantic import BaseModel

from schemas.inference import (
    CurrentAdapter,
    LoadAdapterRequest,
    ModelList,
    ServerInfo,
    UnloadAdapterRequest,
)
from trainer.config import PublishSettings
from trainer.publish._http import Deadline, ServerConnection
from trainer.publish._retry import Repeatability
from trainer.publish.errors import ActivationFailed, Phase, ServerFailure

logger = logging.getLogger(__name__)

CURRENT_ADAPTER = "/atropos/adapter"
LOAD_ADAPTER = "/v1/load_lora_adapter"
UNLOAD_ADAPTER = "/v1/unload_lora_adapter"

_ADAPTERS_IN_USE = re.compile(r"^vllm:lora_requests_info\{(?P<labels>[^}]*)\} (?P<time>\S+)$", re.MULTILINE)
_NAMES_IN_USE = re.compile(r'(?:running|waiting)_lora_adapters="([^"]*)"')


class VllmAdapters:
    """The part of vLLM's dialect that speaks of adapters; `VllmRoutes` inherits it."""

    _connection: ServerConnection
    _settings: PublishSettings

    def __init__(self) -> None:
        self._loaded: set[str] = set()
        """Everything that we have loaded: what may be in use where the server does not tell."""

    def takes_adapters(self) -> bool:
        """Ask for the routes without using them; say in the log what is missing."""
        missing = []
        if not self._has_route(LOAD_ADAPTER):
            missing.append("VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment")
        if not self._has_route(CURRENT_ADAPTER):
            missing.append("--middleware atropos_generate.AtroposGenerate")
        info = self._server_info()
        limits = info.vllm_config.lora_config if info is not None else None
        if info is not None and limits is None:
            missing.append("--enable-lora")
        if missing:
            logger.warning("%s takes no adapters: it lacks %s", self._connection.url, " and ".join(missing))
            return False
        if limits is not None and limits.max_loras == 1:
            logger.warning(
                "%s serves one adapter at a time: every new version waits until the last request on the one "
                "before has ended, and its verification too. Start vLLM with --max-loras 2 or more",
                self._connection.url,
            )
        return True

    def adapters(self, version: int) -> set[str]:
        """The adapters in `/v1/models`, and those that requests in flight still sample from."""
        models = self._ask("/v1/models", version)
        cards = self._connection.parse(models, ModelList, phase=Phase.ACTIVATE, version=version).data
        return {card.id for card in cards if card.parent is not None} | self._in_use(version)

    def load_adapter(self, name: str, path: Path, version: int) -> None:
        """Load it; vLLM reads the directory before it answers."""
        self._loaded.add(name)
        self._send(
            LOAD_ADAPTER,
            LoadAdapterRequest(lora_name=name, lora_path=str(path.absolute())),
            phase=Phase.LOAD,
            version=version,
            seconds=self._settings.load_timeout,
            repeatability=Repeatability.ONCE,
        )

    def active_adapter(self, version: int) -> str | None:
        """Ask the middleware from which adapter `/generate` samples."""
        reply = self._ask(CURRENT_ADAPTER, version)
        return self._connection.parse(reply, CurrentAdapter, phase=Phase.ACTIVATE, version=version).name

    def activate_adapter(self, name: str, version: int) -> None:
        """Tell the middleware."""
        reply = self._send(
            CURRENT_ADAPTER,
            CurrentAdapter(name=name, weight_version=str(version)),
            phase=Phase.ACTIVATE,
            version=version,
            seconds=self._settings.pause_timeout,
        )
        current = self._connection.parse(reply, CurrentAdapter, phase=Phase.ACTIVATE, version=version)
        if current.name != name:
            raise ActivationFailed(
                f"POST {CURRENT_ADAPTER}: /generate samples from {current.name!r} instead of {name!r}",
                server=self._connection.url,
                phase=Phase.ACTIVATE,
                version=version,
            )

    def use_model_itself(self) -> None:
        """Tell the middleware, if it is there and has an adapter active."""
        try:
            reply = self._ask(CURRENT_ADAPTER, None, phase=Phase.CONNECT)
        except ServerFailure as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            return
        current = self._connection.parse(reply, CurrentAdapter, phase=Phase.CONNECT, version=None)
        if current.name is None:
            return
        logger.warning(
            "%s: environments sampled from the adapter %s of an earlier run; from now on from the model",
            self._connection.url,
            current.name,
        )
        self._send(
            CURRENT_ADAPTER,
            CurrentAdapter(name=None, weight_version=None),
            phase=Phase.CONNECT,
            version=None,
            seconds=self._settings.pause_timeout,
        )

    def unload_adapter(self, name: str, version: int) -> None:
        """Take the name away; requests in flight end undisturbed."""
        try:
            self._send(
                UNLOAD_ADAPTER,
                UnloadAdapterRequest(lora_name=name),
                phase=Phase.ACTIVATE,
                version=version,
                seconds=self._settings.pause_timeout,
            )
        except ServerFailure as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise

    def _has_route(self, path: str) -> bool:
        """Whether there is something under a path; a GET changes nothing, wherever it ends."""
        try:
            self._ask(path, None, phase=Phase.READY)
        except ServerFailure as error:
            if error.status not in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
                raise
            return error.status == HTTPStatus.METHOD_NOT_ALLOWED
        return True

    def _server_info(self) -> ServerInfo | None:
        """What the server was started with; None from one without VLLM_SERVER_DEV_MODE=1."""
        try:
            reply = self._ask("/server_info", None, phase=Phase.READY, query={"config_format": "json"})
        except ServerFailure as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            return None
        return self._connection.parse(reply, ServerInfo, phase=Phase.READY, version=None)

    def _in_use(self, version: int) -> set[str]:
        """Adapters of requests in flight, from `/metrics`; all that we ever loaded where that is off.

        vLLM writes one line for every combination that there ever was, with the time as its value.
        """
        try:
            metrics = self._ask("/metrics", version).decode("utf-8", "replace")
        except ServerFailure as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            metrics = ""
        lines = [(float(line["time"]), line["labels"]) for line in _ADAPTERS_IN_USE.finditer(metrics)]
        if not lines:
            return set(self._loaded)
        _, newest = max(lines)
        return {name for names in _NAMES_IN_USE.findall(newest) for name in names.split(",") if name}

    def _ask(
        self,
        path: str,
        version: int | None,
        *,
        phase: Phase = Phase.ACTIVATE,
        query: dict[str, str] | None = None,
    ) -> bytes:
        return self._connection.call(
            "GET",
            path,
            phase=phase,
            version=version,
            deadline=Deadline(self._settings.pause_timeout),
            repeatability=Repeatability.IDEMPOTENT,
            query=query,
        )

    def _send(
        self,
        path: str,
        body: BaseModel,
        *,
        phase: Phase,
        version: int | None,
        seconds: float,
        repeatability: Repeatability = Repeatability.IDEMPOTENT,
    ) -> bytes:
        return self._connection.call(
            "POST",
            path,
            phase=phase,
            version=version,
            deadline=Deadline(seconds),
            repeatability=repeatability,
            body=body.model_dump(mode="json"),
        )

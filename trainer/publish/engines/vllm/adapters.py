"""Loads adapters into a vLLM server: its runtime LoRA routes, and our middleware's `/atropos/adapter`.

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

from schemas.inference import (
    CurrentAdapter,
    LoadAdapterRequest,
    ModelList,
    ServerInfo,
    UnloadAdapterRequest,
)
from trainer.config import PublishSettings
from trainer.publish.errors import Phase, ServerFailure
from trainer.publish.interfaces import InferenceServer

logger = logging.getLogger(__name__)

CURRENT_ADAPTER = "/atropos/adapter"
LOAD_ADAPTER = "/v1/load_lora_adapter"
UNLOAD_ADAPTER = "/v1/unload_lora_adapter"

_ADAPTERS_IN_USE = re.compile(r"^vllm:lora_requests_info\{(?P<labels>[^}]*)\} (?P<time>\S+)$", re.MULTILINE)
_NAMES_IN_USE = re.compile(r'(?:running|waiting)_lora_adapters="([^"]*)"')


class AdapterRoutes(InferenceServer):
    """Loads adapters at run time, and lets environments sample from one without naming it."""

    def __init__(self, url: str, settings: PublishSettings) -> None:
        super().__init__(url, settings)
        self._loaded: set[str] = set()
        """Everything that we have loaded: what may be in use where the server does not tell."""

    def takes_adapters(self) -> bool:
        """Tell whether adapters can be loaded AND reach the environments; say in the log what is missing."""
        missing = []
        if not self._has_route(LOAD_ADAPTER):
            missing.append("VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment")
        if not self._has_route(CURRENT_ADAPTER):
            missing.append("--middleware atropos_generate.AtroposGenerate")
        info = self._connection.ask_if_known(  # None: without VLLM_SERVER_DEV_MODE=1
            ServerInfo, "GET /server_info", Phase.READY, query={"config_format": "json"}
        )
        limits = info.vllm_config.lora_config if info is not None else None
        if info is not None and limits is None:
            missing.append("--enable-lora")
        if missing:
            logger.warning("%s takes no adapters: it lacks %s", self.url, " and ".join(missing))
            return False
        if limits is not None and limits.max_loras == 1:
            logger.warning(
                "%s serves one adapter at a time: every new version waits until the last request on the one "
                "before has ended, and its verification too. Start vLLM with --max-loras 2 or more",
                self.url,
            )
        return True

    def adapters(self) -> set[str]:
        """Read from `/v1/models` which are loaded, and which requests in flight still sample from."""
        models = self._connection.ask(ModelList, "GET /v1/models", Phase.ACTIVATE)
        return {card.id for card in models.data if card.parent is not None} | self._in_use()

    def load_adapter(self, name: str, path: Path) -> None:
        """Load an adapter under a name that was never used; vLLM reads the directory before it answers."""
        self._loaded.add(name)
        body = LoadAdapterRequest(lora_name=name, lora_path=str(path.absolute()))
        self._connection.call(f"POST {LOAD_ADAPTER}", Phase.LOAD, body=body, once=True)

    def active_adapter(self) -> str | None:
        """Ask the middleware from which adapter `/generate` samples; None: the model itself."""
        return self._connection.ask(CurrentAdapter, f"GET {CURRENT_ADAPTER}", Phase.ACTIVATE).name

    def activate_adapter(self, name: str, version: int) -> None:
        """Tell the middleware: environments sample from it from now on, without changing their model name."""
        route = f"POST {CURRENT_ADAPTER}"
        body = CurrentAdapter(name=name, weight_version=str(version))
        current = self._connection.ask(CurrentAdapter, route, Phase.ACTIVATE, body=body)
        if current.name != name:
            found = f"{route}: /generate samples from {current.name!r} instead of {name!r}"
            raise self.failure(Phase.ACTIVATE, found)

    def use_model_itself(self) -> None:
        """Tell the middleware, if it is there and has an adapter active."""
        current = self._connection.ask_if_known(CurrentAdapter, f"GET {CURRENT_ADAPTER}", Phase.CONNECT)
        if current is None or current.name is None:
            return
        logger.warning(
            "%s: environments sampled from the adapter %s of an earlier run; from now on from the model",
            self.url,
            current.name,
        )
        nothing = CurrentAdapter(name=None, weight_version=None)
        self._connection.call(f"POST {CURRENT_ADAPTER}", Phase.CONNECT, body=nothing)

    def unload_adapter(self, name: str) -> None:
        """Take the name away, if it is known; requests in flight end undisturbed."""
        body = UnloadAdapterRequest(lora_name=name)
        self._connection.call_if_known(f"POST {UNLOAD_ADAPTER}", Phase.ACTIVATE, body=body)

    def _has_route(self, path: str) -> bool:
        """Tell whether there is something under a path; a GET changes nothing, wherever it ends."""
        try:
            return self._connection.call_if_known(f"GET {path}", Phase.READY) is not None
        except ServerFailure as error:
            if error.status != HTTPStatus.METHOD_NOT_ALLOWED:
                raise
            return True

    def _in_use(self) -> set[str]:
        """Find the adapters of requests in flight in `/metrics`; all that we ever loaded where that is off.

        vLLM writes one line for every combination that there ever was, with the time as its value.
        """
        said = self._connection.call_if_known("GET /metrics", Phase.ACTIVATE)
        metrics = (said or b"").decode("utf-8", "replace")
        lines = [(float(line["time"]), line["labels"]) for line in _ADAPTERS_IN_USE.finditer(metrics)]
        if not lines:
            return set(self._loaded)
        _, newest = max(lines)
        return {name for names in _NAMES_IN_USE.findall(newest) for name in names.split(",") if name}

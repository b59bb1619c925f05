"""Atropos's own client of an inference server."""

from __future__ import annotations

from typing import Any

from tests.vllm.launching import SERVED_NAME, VllmServer


def make_manager(server: VllmServer, **settings: Any) -> Any:
    """Atropos's server manager with one vLLM server, as an environment makes it."""
    from atroposlib.envs.server_handling.server_manager import APIServerConfig, ServerManager

    config = APIServerConfig(
        model_name=SERVED_NAME,
        base_url=f"{server.url}/v1",
        api_key=server.api_key or "unused",
        tokenizer_name=str(server.model),
        server_type="vllm",
        health_check=False,
        num_requests_for_eval=4,
        **settings,
    )
    return ServerManager([config])

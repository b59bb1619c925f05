"""The services of one run: started by name, watched together, stopped in an order that loses nothing."""

from __future__ import annotations

import json
import logging
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from signal import SIGTERM, Signals

from local_stack.commands import Address
from local_stack.processes import ChildProcess

logger = logging.getLogger(__name__)

_HEALTH_TIMEOUT = 5.0
_GENERATION_TIMEOUT = 180.0
"""The first tokens of a server that has just started may take long: vLLM took up to 18 s on two cores."""


class Services:
    """The child processes of a run.

    Args:
        log_dir: Each service logs into `<name>.log` here.
        environment: Variables set for every service.
    """

    def __init__(self, log_dir: Path, *, environment: Mapping[str, str]) -> None:
        self._log_dir = log_dir
        self._environment = environment
        self._children: dict[str, ChildProcess] = {}

    def __getitem__(self, name: str) -> ChildProcess:
        return self._children[name]

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        stop_signal: Signals = SIGTERM,
        may_finish: bool = False,
        has_children: bool = False,
    ) -> ChildProcess:
        """Start a service; it is watched from now on.

        Args:
            name: What messages call it.
            command: Program and arguments.
            environment: Variables for this service only, on top of those for all.
            stop_signal: What asks it to end by itself.
            may_finish: Whether it may end, with status 0.
            has_children: Whether it starts processes that may outlive it.
        """
        child = ChildProcess(
            name,
            command,
            log_path=self._log_dir / f"{name.replace(' ', '-').lower()}.log",
            environment={**self._environment, **(environment or {})},
            stop_signal=stop_signal,
            may_finish=may_finish,
            has_children=has_children,
        )
        self._children[name] = child
        return child

    def require_all_healthy(self) -> None:
        """Raise `ProcessDiedError` for the first service, in the order of starting, that is not."""
        for child in self._children.values():
            child.require_healthy()

    def stop(self, names: Sequence[str], *, patience: Mapping[str, float], hurry: Callable[[], bool]) -> None:
        """Ask the named services to end, all at once, and wait for each of them.

        Args:
            names: Which; those that are not running are passed over.
            patience: Seconds that each may take before it is killed.
            hurry: Once true, everything is killed without waiting on.
        """
        asked = [self._children[name] for name in names if name in self._children]
        started = time.monotonic()
        for child in asked:
            child.ask_to_stop()
        for child in asked:
            left = started + patience[child.name] - time.monotonic()
            child.wait_or_kill(max(0.0, left), hurry=hurry)
            del self._children[child.name]

    def kill_all(self) -> None:
        """End everything at once."""
        for child in self._children.values():
            child.kill()
        self._children.clear()


def free_addresses(count: int) -> list[Address]:
    """Return `count` different loopback addresses that nothing listens on at this moment."""
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [Address(port=each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def answers(url: str) -> bool:
    """Whether a GET of `url`, a loopback address, is answered with success."""
    return _succeeds(urllib.request.Request(url), timeout=_HEALTH_TIMEOUT)  # noqa: S310 - our own http URL


def generates(url: str) -> bool:
    """Whether the inference server at base URL `url`, a loopback address, generates a token."""
    body = {"prompt": {"prompt_token_ids": [1]}, "max_tokens": 1, "temperature": 1.0, "logprobs": 0}
    request = urllib.request.Request(  # noqa: S310 - our own http URL
        f"{url}/generate",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
        method="POST",
    )
    return _succeeds(request, timeout=_GENERATION_TIMEOUT)


def _succeeds(request: urllib.request.Request, *, timeout: float) -> bool:
    # A proxy of the environment must not be asked for an address on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False

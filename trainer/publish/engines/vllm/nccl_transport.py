"""Sends weights from the live model into vLLM's workers, without a disk: the transports `nccl` and `ipc`.

vLLM's own classes do the transfer (`nccl_sender`); here is what surrounds it: one group for each server, a
deadline around every step that could wait for ever, and tidying up after a failure.

A group whose transfer failed is never used again. The next attempt builds a new one. If the server still
answers, it is first brought out of the half-done update, because vLLM holds layers without any data in the
middle of one and would fail at the next token.

Servers get the weights one after the other: vLLM's sender shares its CUDA streams between all groups of a
process, and gathering sharded weights is a collective. A server that waits for its turn is paused already.
"""

from __future__ import annotations

import errno
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from http import HTTPStatus
from typing import NoReturn, TypeVar

import httpx
import torch

from atropos_client import is_loopback
from trainer.config import PublishSettings, plain_url
from trainer.errors import ConfigurationError
from trainer.model.weight_stream import WeightStream
from trainer.publish.engines.vllm.nccl_sender import (
    Backend,
    SyncClient,
    TransferEngine,
    TransferGroup,
    build_engine,
    require_vllm,
)
from trainer.publish.engines.vllm.routes import VllmRoutes
from trainer.publish.errors import Phase, PhaseDeadlineExceeded, ServerFailure
from trainer.publish.interfaces import InferenceServer, StagedWeights, WeightTransport
from trainer.publish.transports.bounded_call import BoundedCall, NotEndedError

logger = logging.getLogger(__name__)

ABORT_SECONDS = 10.0
"""For leaving a group. vLLM gives NCCL 5 seconds to abort; a GPU that hangs longer will not come back."""

PORT_ATTEMPTS = 8
"""A rendezvous that nobody came to keeps its port for some minutes; the next attempts step over it."""

Value = TypeVar("Value")


class VllmTransferTransport(WeightTransport):
    """Sends the live model's weights to vLLM servers.

    Args:
        backend: `nccl`: over the network or between GPUs of one machine. `ipc`: to a server on the same GPU.
        stream: The weights.
        settings: Section `publish` of the configuration.
        build: Builds a group's engine; None: vLLM's own.
        sending: Entered for as long as weights go to one server: what has to happen where they are spread
            over processes.

    Raises:
        ConfigurationError: This machine or this configuration cannot send that way.
    """

    overlaps = False

    def __init__(
        self,
        backend: Backend,
        stream: WeightStream,
        settings: PublishSettings,
        *,
        build: Callable[[TransferGroup], TransferEngine] | None = None,
        sending: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        if backend == "ipc":
            _require_one_machine(settings.servers)
        if build is None:
            require_vllm(backend, stream.device)
        self._backend = backend
        self._stream = stream
        self._settings = settings
        self._build = build or build_engine
        self._sending = sending
        self._groups: dict[str, tuple[SyncClient, TransferEngine]] = {}
        self._turn = threading.Lock()

    def capture(self, version: int) -> Callable[[], StagedWeights]:
        """Wait for the last step's work on the GPU, and say what will travel; nothing is copied."""
        if self._stream.device.type == "cuda":
            torch.cuda.current_stream(self._stream.device).synchronize()
        staged = StagedWeights(
            version=version, dtype=self._stream.dtype_name, weight_bytes=self._stream.total_bytes
        )
        return lambda: staged

    def connect(self, server: InferenceServer) -> WeightTransport:
        """Build a new group with a server; an older one is left behind without waiting for it.

        Raises:
            ServerFailure: The server was not started for this transport, or its workers did not come.
        """
        if not isinstance(server, VllmRoutes):
            found = f"its engine takes no weights over {self._backend}; use publish.transport disk"
            raise server.failure(Phase.CONNECT, found)
        with self._turn:
            former = self._groups.pop(server.url, None)
            if former is not None:
                self._leave(former)
            server.use_model_itself()
            self._free_server(server)
            workers = server.world_size()
            if self._backend == "ipc" and workers != 1:
                found = f"it has {workers} workers, and ipc reaches only the one on the trainer's own GPU"
                raise server.failure(Phase.CONNECT, found)
            client = SyncClient(server)
            try:
                group = TransferGroup(
                    backend=self._backend,
                    client=client,
                    stream=self._stream,
                    workers=workers,
                    address=self._settings.group_address,
                    port=_rendezvous_port(self._settings, server) if self._backend == "nccl" else 0,
                )
                call = self._call(lambda: self._join(group), f"connect {server.url}")
                client.on_failure = call.fail
                engine = call.start().within(self._settings.load_timeout)
            except BaseException as error:  # noqa: BLE001 - raised again, by its name
                client.close()
                self._raise(error, server, Phase.CONNECT)
            client.on_failure = lambda _error: None
            self._groups[server.url] = client, engine
        return self

    def load(self, server: InferenceServer, staged: StagedWeights) -> None:
        """Send the weights, when it is this server's turn.

        Raises:
            ServerFailure: The server refused, or the transfer did not end in time. The group is given up.
        """
        with self._turn:
            if server.url not in self._groups:
                raise server.failure(Phase.LOAD, "there is no transfer group with it")
            client, engine = self._groups[server.url]
            call = self._call(engine.send_weights, f"send {server.url}")
            client.on_failure = call.fail
            with self._sending():
                try:
                    call.start().within(self._settings.load_timeout)
                except BaseException as error:  # noqa: BLE001 - raised again, by its name
                    self._give_up(client, error)
                    self._raise(error, server, Phase.LOAD)

    def close(self, servers: Sequence[InferenceServer]) -> None:
        """Leave all groups, and let the workers leave them."""
        for server in servers:
            group = self._groups.pop(server.url, None)
            if group is None:
                continue
            leaving = self._call(group[0].shutdown_weight_transfer_engine, f"close {server.url}")
            try:
                leaving.start().within(ABORT_SECONDS)
            except (ServerFailure, NotEndedError) as error:
                logger.debug("%s: leaving its transfer group: %s", server.url, error)
            self._wait_for(self._leave(group))

    def _call(self, action: Callable[[], Value], name: str) -> BoundedCall[Value]:
        """Bind an action to the weights' GPU, to be started: the current GPU is a thread's own affair."""

        def run() -> Value:
            if self._stream.device.type == "cuda":
                torch.cuda.set_device(self._stream.device)
            return action()

        return BoundedCall(run, name=name)

    def _join(self, group: TransferGroup) -> TransferEngine:
        engine = self._build(group)
        if group.client.closed:  # its workers came after it was given up
            engine.shutdown()
        return engine

    def _leave(self, group: tuple[SyncClient, TransferEngine]) -> BoundedCall[None]:
        """Abort a group, in a thread of its own."""
        client, engine = group
        client.close()
        return self._call(engine.shutdown, "leave transfer group").start()

    def _wait_for(self, call: BoundedCall[None]) -> None:
        try:
            call.within(ABORT_SECONDS)
        except Exception as error:  # noqa: BLE001 - whatever NCCL says of a group that is dead anyway
            logger.warning("leaving a transfer group: %s", error)

    def _give_up(self, client: SyncClient, error: BaseException) -> None:
        """Leave the group, so that the GPU is free again; bring the server out of the update."""
        self._wait_for(self._leave(self._groups.pop(client.server.url)))
        stuck = isinstance(error, NotEndedError | PhaseDeadlineExceeded)
        gone = isinstance(error, ServerFailure) and error.status in (None, HTTPStatus.NOT_FOUND)
        if not stuck and not gone and isinstance(error, Exception):
            self._end_update(client.server)

    def _end_update(self, server: VllmRoutes) -> None:
        """End a half-done update: layers that got nothing keep their old weights.

        vLLM counts an update that failed as ended, but only the end of one puts the layers back. So if there
        is none to be ended, one is begun for that.
        """
        seconds = self._settings.pause_timeout
        try:
            try:
                server.weight_request("/finish_weight_update", seconds=seconds)
            except ServerFailure:
                server.weight_request("/start_weight_update", seconds=seconds)
                server.weight_request("/finish_weight_update", seconds=seconds)
        except ServerFailure as error:
            logger.warning(
                "%s is in the middle of a weight update and does not come out of it: restart it (%s)",
                server.url,
                error,
            )

    def _free_server(self, server: VllmRoutes) -> None:
        """Let the workers leave the group of an earlier attempt, or of a trainer that died.

        Raises:
            PhaseDeadlineExceeded: They do not answer: they still wait in that group.
        """
        seconds = self._settings.pause_timeout
        for last in (False, True):
            try:
                server.weight_request("/shutdown_weight_transfer_engine", seconds=seconds)
            except PhaseDeadlineExceeded as error:
                raise server.failure(
                    Phase.CONNECT,
                    f"its workers did not leave the former transfer group within {seconds:g} s; they may "
                    "wait in it for ever, then only a restart of the server helps",
                    PhaseDeadlineExceeded,
                ) from error
            except ServerFailure as error:
                if last or error.status != HTTPStatus.INTERNAL_SERVER_ERROR:
                    logger.debug("%s: no transfer group to leave: %s", server.url, error)
                    return
                self._end_update(server)  # vLLM refuses in the middle of an update
            else:
                return

    def _raise(self, error: BaseException, server: InferenceServer, phase: Phase) -> NoReturn:
        """Raise our own errors as they are, anything else as the phase's error."""
        # A request's deadline is the same one, and ends with it: either may be first.
        if isinstance(error, NotEndedError | PhaseDeadlineExceeded):
            limit = f"within {self._settings.load_timeout:g} s (publish.load_timeout)"
            reason = f"the transfer group did not come together {limit}"
            if phase is Phase.LOAD:
                reason = (
                    f"the transfer did not end {limit}; its group is given up. If a worker still waits in "
                    "it, only a restart of the server helps"
                )
            raise server.failure(phase, reason, PhaseDeadlineExceeded) from error
        if isinstance(error, ServerFailure | ConfigurationError) or not isinstance(error, Exception):
            raise error
        raise server.failure(phase, f"{type(error).__name__} in the sender: {error}") from error


def _rendezvous_port(settings: PublishSettings, server: InferenceServer) -> int:
    """Find a free port: the server's own, counted from `publish.group_port`, or the next that is no other's.

    Raises:
        ServerFailure: None can be had.
    """
    address = settings.group_address
    servers = [plain_url(url) for url in settings.servers]
    first = settings.group_port + servers.index(server.url)
    ports = [first + attempt * len(servers) for attempt in range(PORT_ATTEMPTS)]
    for port in ports:
        try:
            with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((address, port))
        except (OSError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                continue
            raise server.failure(
                Phase.CONNECT,
                f"cannot listen on {address}:{port} for its workers ({error}); publish.group_address has to "
                "be an address of this machine",
            ) from error
        return port
    raise server.failure(
        Phase.CONNECT,
        f"the ports {', '.join(map(str, ports))} for the rendezvous are all taken; set another "
        "publish.group_port",
    )


def _require_one_machine(servers: Sequence[str]) -> None:
    """Refuse servers elsewhere: `ipc` sends a pickle, which a server accepts only from whom it trusts."""
    for url in servers:
        if not is_loopback(httpx.URL(url).host):
            raise ConfigurationError(
                f"publish.transport ipc hands memory over inside one machine, but {plain_url(url)} in "
                "publish.servers is not a loopback address; use 127.0.0.1, or publish.transport nccl"
            )

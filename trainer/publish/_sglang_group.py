"""The transport `nccl` for SGLang: weights from the live model into the workers, without a disk.

    trainer (rank 0)                                  server (ranks 1..)
    POST /init_weights_update_group                   joins
    POST /begin_weight_update                         takes weights from now on
      for each bucket:
    POST /update_weights_from_distributed (names) ─┐  waits in the collective
    broadcast each weight                         ─┘  loads them
    POST /end_weight_update                           puts them to use

Request and broadcast run at the same time, each may wait for the other for ever, so each failure ends both:
the group is aborted and never used again, and the next attempt builds a new one. What ends a worker that
waits for a broadcast that does not come is torch's own limit there, or a restart.

Servers get the weights one after the other: gathering sharded weights is a collective. A server that waits
for its turn is paused already.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any, NoReturn, TypeVar

import torch
from pydantic import BaseModel
from torch import Tensor

from schemas import sglang as wire
from trainer.config import PublishSettings
from trainer.errors import ConfigurationError
from trainer.publish._bounded import BoundedCall, NotEndedError
from trainer.publish._protocol import InferenceServer, StagedWeights
from trainer.publish._rendezvous import RendezvousPorts
from trainer.publish._sglang_sender import GroupPlace, SendingGroup, sglang_group
from trainer.publish._weight_stream import WeightStream
from trainer.publish.errors import ConnectFailed, LoadFailed, Phase, PhaseDeadlineExceeded, ServerFailure

logger = logging.getLogger(__name__)

LEAVE_SECONDS = 10.0
"""For leaving a group, on either side; a GPU that hangs longer will not come back."""

WATCHDOG_SECONDS = 60.0
"""So much longer is torch's own limit than ours: NCCL's watchdog ends the process, ours only the publish."""

Fail = Callable[[BaseException], None]
Value = TypeVar("Value")


class _Link:
    """One server's group, and the requests that steer it."""

    def __init__(self, server: InferenceServer, group: SendingGroup, name: str) -> None:
        self._server = server
        self.group = group
        self.name = name
        self.version: int | None = None
        """The version that is being sent, for messages."""
        self.closed = False
        """Whether it was given up: what is still under way must not meddle with the next one."""

    def request(self, route: str, body: BaseModel) -> None:
        if self.closed:
            raise LoadFailed(
                f"{route} is not sent: this transfer was given up",
                server=self._server.url,
                phase=Phase.LOAD,
                version=self.version,
            )
        self._server.weight_request(route, body.model_dump(mode="json", exclude_unset=True), self.version)

    def begin(self) -> None:
        """Begin an update; one that a trainer before us has left open is ended first."""
        try:
            self.request("/begin_weight_update", wire.UpdateBeginRequest())
        except ServerFailure as refusal:
            try:
                self.end()
            except ServerFailure:
                raise refusal from None
            self.request("/begin_weight_update", wire.UpdateBeginRequest())

    def end(self) -> None:
        """Put to use what has arrived."""
        self.request("/end_weight_update", wire.UpdateEndRequest())


class SglangGroupTransport:
    """Sends the live model's weights to SGLang servers.

    Args:
        stream: The weights.
        settings: Section `publish` of the configuration.
        build: Builds a group that is still to be joined. None: by SGLang's own function, over NCCL.

    Raises:
        ConfigurationError: This machine or this configuration cannot send that way.
    """

    overlaps = False

    def __init__(
        self,
        stream: WeightStream,
        settings: PublishSettings,
        *,
        build: Callable[[], SendingGroup] | None = None,
    ) -> None:
        if settings.pause_mode == "wait":
            raise ConfigurationError(
                "publish.pause_mode wait does not go with publish.transport nccl and SGLang, which has no "
                "pause that waits: requests would run between two pieces of the weights; use keep or abort"
            )
        self._build = build or sglang_group(stream.device)
        self._stream = stream
        self._settings = settings
        self._ports = RendezvousPorts(settings)
        self._links: dict[str, _Link] = {}
        self._turn = threading.Lock()

    def capture(self, version: int) -> Callable[[], StagedWeights]:
        """Nothing is copied: see that the last step's work on the GPU is done, and say what will travel."""
        if self._stream.device.type == "cuda":
            torch.cuda.current_stream(self._stream.device).synchronize()
        staged = StagedWeights(
            version=version, dtype=self._stream.dtype_name, weight_bytes=self._stream.total_bytes
        )
        return lambda: staged

    def connect(self, server: InferenceServer) -> None:
        """Build a new group with a server; an older one is left.

        Raises:
            ServerFailure: Its workers cannot or did not join.
        """
        with self._turn:
            former = self._links.pop(server.url, None)
            if former is not None:
                self._leave(server, former)
            place = GroupPlace(
                address=self._settings.group_address,
                port=self._ports.free(server.url),
                world_size=server.world_size(None) + 1,
                name=f"atropos-{secrets.token_hex(4)}",
                seconds=self._settings.load_timeout + WATCHDOG_SECONDS,
            )
            link = _Link(server, self._build(), place.name)
            try:
                self._run(lambda fail: self._join(link, place, fail), f"connect {server.url}").result(
                    self._settings.load_timeout
                )
            except BaseException as error:  # noqa: BLE001 - raised again, by its name
                self._leave(server, link, ask_server=False)
                self._raise(error, server, Phase.CONNECT, None)
            self._links[server.url] = link

    def needs_pause(self, server: InferenceServer) -> bool:
        """Weights are replaced in place, so nothing may be computed meanwhile."""
        return True

    def served_name(self, server: InferenceServer, staged: StagedWeights) -> str | None:
        """The model's own."""
        return None

    def load(self, server: InferenceServer, staged: StagedWeights) -> None:
        """Send the weights, when it is this server's turn.

        Raises:
            ServerFailure: The server refused, or the transfer did not end in time. The group is given up.
        """
        with self._turn:
            link = self._links.get(server.url)
            if link is None:
                raise LoadFailed(
                    "there is no process group with it",
                    server=server.url,
                    phase=Phase.LOAD,
                    version=staged.version,
                )
            link.version = staged.version
            try:
                self._run(lambda fail: self._send(link, fail), f"send {server.url}").result(
                    self._settings.load_timeout
                )
            except BaseException as error:  # noqa: BLE001 - raised again, by its name
                self._give_up(server, link, error)
                self._raise(error, server, Phase.LOAD, staged.version)

    def activate(self, server: InferenceServer, staged: StagedWeights) -> None:
        """Nothing to do: what is loaded is what is sampled from."""

    def is_served(self, server: InferenceServer, staged: StagedWeights) -> bool:
        """Whether the label still agrees; a server without labels cannot tell."""
        label = server.weight_version(staged.version)
        return label is None or label == str(staged.version)

    def prune(self, served: int) -> None:
        """Nothing is kept."""

    def close(self, servers: Sequence[InferenceServer]) -> None:
        """Leave all groups, and let the workers leave them."""
        for server in servers:
            link = self._links.pop(server.url, None)
            if link is not None:
                self._leave(server, link)

    # --- the two sides ----------------------------------------------------------------------------

    def _join(self, link: _Link, place: GroupPlace, fail: Fail) -> None:
        body = wire.GroupInitRequest(
            master_address=place.address,
            master_port=place.port,
            rank_offset=1,
            world_size=place.world_size,
            group_name=place.name,
            backend=link.group.backend,
        )
        joining = self._beside(lambda: link.request("/init_weights_update_group", body), fail)
        link.group.join(place)
        if link.closed:  # the workers came after it was given up
            link.group.leave()
            return
        joining.result(self._settings.load_timeout)

    def _send(self, link: _Link, fail: Fail) -> None:
        link.begin()
        for bucket in self._stream.buckets():
            receive = partial(link.request, "/update_weights_from_distributed", _announce(bucket, link.name))
            receiving = self._beside(receive, fail)
            link.group.broadcast([tensor for _, tensor in bucket])
            receiving.result(self._settings.load_timeout)
        link.end()

    def _beside(self, request: Callable[[], None], fail: Fail) -> BoundedCall[None]:
        """Send a request while its other side runs here; if it fails, nobody waits for that any more."""

        def run() -> None:
            try:
                request()
            except BaseException as error:
                fail(error)
                raise

        return BoundedCall(run, name="request beside a transfer").start()

    def _run(self, action: Callable[[Fail], Value], name: str) -> BoundedCall[Value]:
        """Start an action on the weights' GPU, which is a thread's own affair, with a way to end the wait."""

        def run() -> Value:
            if self._stream.device.type == "cuda":
                torch.cuda.set_device(self._stream.device)
            return action(call.fail)

        call = BoundedCall(run, name=name)
        return call.start()

    # --- after a failure --------------------------------------------------------------------------

    def _give_up(self, server: InferenceServer, link: _Link, error: BaseException) -> None:
        """Leave the group, so that the GPU is free again; bring the server out of the update."""
        del self._links[server.url]
        stuck = isinstance(error, NotEndedError | PhaseDeadlineExceeded)
        self._leave(server, link, ask_server=False)
        if stuck or not isinstance(error, Exception):
            return

        def tidy() -> None:
            for route, body in (
                ("/end_weight_update", wire.UpdateEndRequest()),
                ("/destroy_weights_update_group", wire.GroupDestroyRequest(group_name=link.name)),
            ):
                try:
                    server.weight_request(route, body.model_dump(mode="json"), link.version)
                except ServerFailure as failure:
                    logger.debug("%s: after a transfer that failed: %s", server.url, failure)

        try:
            BoundedCall(tidy, name=f"tidy up {server.url}").start().result(self._settings.pause_timeout)
        except NotEndedError:
            logger.warning(
                "%s is in the middle of a weight update and does not answer: restart it", server.url
            )

    def _leave(self, server: InferenceServer, link: _Link, *, ask_server: bool = True) -> None:
        """Leave a group; without an answer it is left all the same."""
        link.closed = True
        steps: list[Callable[[], None]] = [link.group.leave]
        if ask_server:
            body = wire.GroupDestroyRequest(group_name=link.name).model_dump(mode="json")
            steps.insert(0, partial(server.weight_request, "/destroy_weights_update_group", body, None))
        for step in steps:
            try:
                BoundedCall(step, name="leave a process group").start().result(LEAVE_SECONDS)
            except Exception as error:  # noqa: BLE001 - whatever is said of a group that nobody needs
                logger.debug("%s: leaving its process group: %s", server.url, error)

    def _raise(
        self, error: BaseException, server: InferenceServer, phase: Phase, version: int | None
    ) -> NoReturn:
        """Raise our own errors as they are, anything else as the phase's error."""
        where: dict[str, Any] = {"server": server.url, "phase": phase, "version": version}
        if isinstance(error, NotEndedError):
            limit = f"within {error.seconds:g} s (publish.load_timeout)"
            reason = f"the process group did not come together {limit}"
            if phase is Phase.LOAD:
                reason = (
                    f"the transfer did not end {limit}; its group is given up. If a worker still waits in "
                    "it, only a restart of the server helps"
                )
            raise PhaseDeadlineExceeded(reason, **where) from error
        if isinstance(error, ServerFailure) and error.status == HTTPStatus.NOT_FOUND:
            raise type(error)(
                f"{error.reason}; this version of SGLang takes no weights from a process group",
                server=error.server,
                phase=error.phase,
                version=error.version,
                status=error.status,
                server_text=error.server_text,
            ) from error
        own = isinstance(error, ServerFailure | ConfigurationError)
        if own or not isinstance(error, Exception):
            raise error
        kind = ConnectFailed if phase is Phase.CONNECT else LoadFailed
        raise kind(f"{type(error).__name__} in the sender: {error}", **where) from error


def _announce(bucket: Sequence[tuple[str, Tensor]], group_name: str) -> wire.GroupUpdateRequest:
    return wire.GroupUpdateRequest(
        names=[name for name, _ in bucket],
        dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        shapes=[list(tensor.shape) for _, tensor in bucket],
        group_name=group_name,
        flush_cache=False,  # once, after all buckets, by a request of its own
    )

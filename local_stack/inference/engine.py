"""The engine: generates for everybody, one step of the whole batch after the other.

Only the computing runs in a thread, `inference-engine`. Whoever changes the batch or the weights holds a fair
lock, and so does every step: pausing, loading weights and new requests come between two steps, in the order
in which they were asked for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from atropos_client.readable import require_readable
from local_stack.inference.batch import Batch
from local_stack.inference.errors import EngineFailure, InferenceError
from local_stack.inference.model import Model
from local_stack.inference.records import EngineSettings, Request
from local_stack.inference.text import TextCodec
from local_stack.inference.weights import fill_model, read_checkpoint
from schemas.inference import PauseMode

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class Engine:
    """Generates for many requests at once; used from one event loop, in which `run` goes on.

    Args:
        settings: The model and the limits.
    """

    def __init__(self, settings: EngineSettings) -> None:
        require_readable(settings.model)
        self.settings = settings
        model = Model(settings)
        self.vocabulary_size = model.vocabulary_size
        """Token ids are below this."""
        self.max_model_len = model.max_model_len
        """Longest sequence in tokens, prompt and completion together."""
        self.codec = TextCodec(settings.model, model.eos_token_ids)
        self.weight_version = "default"
        """The label set last."""
        self.alive = True
        """Whether requests are taken."""
        self.paused = False
        """Whether new requests have to wait for `resume`."""
        self._frozen = False  # the running ones, too
        self._module = model.module
        self._batch = Batch(model, self.codec, settings)
        self._changes = asyncio.Condition()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inference-engine")

    @property
    def running(self) -> int:
        """Sequences in the batch at the moment."""
        return len(self._batch.running)

    async def run(self) -> None:
        """Generate until `stop`."""
        while self.alive:
            async with self._changes:
                await self._changes.wait_for(lambda: self._has_work or not self.alive)
                if self.alive:
                    await self._step()
                    self._changes.notify_all()
        self._thread.shutdown(wait=False)

    async def stop(self) -> None:
        """End all requests with what they have; no further one is taken."""
        self.alive = False
        async with self._changes:
            self._deliver(self._batch.abort())
            self._changes.notify_all()

    async def generate(self, requests: list[Request]) -> None:
        """Complete requests that were checked; cancelled, it ends them."""
        async with self._changes:
            if not self.alive:
                raise EngineFailure("the server is stopping")
            for request in requests:
                self._batch.add(request)
            self._changes.notify_all()
        try:
            await asyncio.gather(*(request.done for request in requests))
        except asyncio.CancelledError:
            async with self._changes:
                for request in requests:
                    self._batch.abort(request)
                self._changes.notify_all()
            raise

    async def pause(self, mode: PauseMode) -> None:
        """Stop generating; returns when nothing is being computed any more.

        Args:
            mode: `abort` ends running and waiting requests with what they have, `wait` lets the running ones
                end first, `keep` freezes them until `resume`.
        """
        async with self._changes:
            if mode == "abort":
                self._deliver(self._batch.abort())
            self.paused, self._frozen = True, mode != "wait"
            self._changes.notify_all()
            await self._changes.wait_for(lambda: self._frozen or not self.paused or not self.running)
            self._frozen = self.paused

    async def resume(self) -> None:
        """Go on generating."""
        async with self._changes:
            self.paused = self._frozen = False
            self._changes.notify_all()

    async def forget_keys(self) -> None:
        """Compute the keys and values of running sequences anew, with the weights of now."""
        async with self._changes:
            self._batch.forget_keys()

    async def reload_weights(self, directory: Path) -> None:
        """Load a checkpoint, whole or not at all.

        Raises:
            CheckpointMismatch: Nothing was changed.
        """
        await self.fill(await asyncio.to_thread(read_checkpoint, directory))

    async def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace the weights, like `reload_weights`."""
        async with self._changes:
            await self._compute(partial(fill_model, self._module, tensors))

    @property
    def _has_work(self) -> bool:
        waiting = not self.paused and self._batch.waiting
        return bool(waiting or (not self._frozen and self.running))

    async def _step(self) -> None:
        try:
            self._deliver(await self._compute(partial(self._batch.step, admit=not self.paused)))
        except Exception as error:  # noqa: BLE001 - one bad step must not end the server: its requests fail
            _log.error("a generation step failed", exc_info=error)
            failure = error
            if not isinstance(error, InferenceError):
                failure = EngineFailure(f"a generation step failed: {error}")
            for request in self._batch.drop_all():
                if not request.done.done():
                    request.done.set_exception(failure)

    async def _compute(self, function: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def _deliver(self, requests: list[Request]) -> None:
        for request in requests:
            if not request.done.done():
                request.done.set_result(None)

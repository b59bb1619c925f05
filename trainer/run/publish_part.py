"""The part of every process in a publish: copies of weights, and log-probs of the probes.

With whole weights process 0 does it alone. Where weights are spread over processes, the others do it too, as
process 0 announces it: they send their rows, and take part in the passes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property, partial

import torch

from trainer.config import TrainerConfig
from trainer.errors import CheckpointError, ConfigurationError
from trainer.export.hf_model import capture_model, write_copy
from trainer.export.peft_adapter import CapturedAdapter, capture_adapter
from trainer.model.own_weights import OwnWeights
from trainer.model.weight_copy import WeightCopy
from trainer.model.weight_requests import WeightRequests
from trainer.model.weight_stream import WeightStream
from trainer.publish import Probes, ProbeScores, make_probes, score_probes
from trainer.publish.delta.snapshot import Snapshot
from trainer.publish.delta.update import Update
from trainer.run.train_state import PreparedRun


class PublishPart:
    """One process's part of each publish.

    Args:
        config: The run's configuration.
        prepared: The model, and how it is spread.
    """

    def __init__(self, config: TrainerConfig, prepared: PreparedRun) -> None:
        self._config = config
        self._settings = config.publish
        self._policy = prepared.policy
        self._spread = prepared.spread
        self._device = prepared.accelerator.device
        self._taken: WeightCopy | Update | None = None
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    @cached_property
    def stream(self) -> WeightStream:
        """The weights as they are published.

        Raises:
            ConfigurationError: They cannot be brought into the base's layout.
        """
        base, dtype = self._policy.base, self.dtype
        try:
            return WeightStream(
                self._policy.model,
                base if dtype is None else base.declaring(dtype),
                dtype=dtype,
                bucket_bytes=self._settings.bucket_mebibytes << 20,
                spread=self._spread,
                requests=self.requests,
            )
        except CheckpointError as error:
            raise ConfigurationError(f"publish.transport {self._settings.transport}: {error}") from error

    @cached_property
    def requests(self) -> WeightRequests | None:
        """How process 0 asks the others for weights that go from the live model into a server."""
        if not self._spread.sharded or self._settings.transport != "nccl":
            return None
        return WeightRequests(self._spread)

    @cached_property
    def probes(self) -> Probes:
        """The questions of verification, the same on every process."""
        limit = self._policy.limits.max_sequence_length
        context = min(limit, self._config.atropos.max_token_length)
        return make_probes(self._policy.tokenizer, self._settings.probes, context=context)

    def capture(self) -> Callable[..., None]:
        """Copy the weights, on process 0; returns a function that writes the copy, from any thread.

        See `capture_model`, and, where weights are spread over processes, `write_copy`.
        """
        if not self._spread.sharded:
            return capture_model(self.stream)
        self._taken = copy = WeightCopy(self.stream)
        return partial(write_copy, stream=self.stream, copy=copy)

    @cached_property
    def _own(self) -> tuple[OwnWeights, Snapshot]:
        own = OwnWeights(self.stream)
        device = torch.device("cpu") if self._settings.delta.snapshot == "cpu" else None
        return own, Snapshot(device, own.starts())

    def take_update(self, version: int) -> Update:
        """Take the own part of the weights, to be compared with what was published last.

        On the CPU the copy is compared while the next step trains, if it may overlap. On an accelerator each
        weight is compared at once: that is quick there, and a second copy would take its memory.
        """
        own, snapshot = self._own
        at_once = not self._settings.overlap or self._settings.delta.snapshot == "device"
        self._taken = update = Update(snapshot, version, own.weights(), self._spread, at_once=at_once)
        return update

    def finish_sending(self) -> None:
        """See that what was taken before has been sent, written or not; on process 0, before the next one."""
        if self._taken is not None:
            self._taken.finish()

    def send(self, version: int) -> None:
        """Take part in what process 0 writes, on the others; what was copied is sent in a thread."""
        if not self._spread.sends_to(0):
            return
        if self._thread is not None:  # process 0 has all that it sends, or it has failed
            self._thread.join()
            self.require_sent()
        if self._settings.transport == "delta":
            taken: WeightCopy | Update = self.take_update(version)
        elif self._settings.overlap:
            taken = WeightCopy(self.stream)
        else:
            self.stream.finish()
            return

        def send() -> None:
            try:
                taken.finish()
            except Exception as error:  # noqa: BLE001 - raised in the training thread
                self._failure = error

        self._thread = threading.Thread(target=send, name="publish-rows", daemon=True)
        self._thread.start()

    def require_sent(self) -> None:
        """Raise what has kept this process from sending its copy."""
        if self._failure is not None:
            raise self._failure

    def capture_adapter(self) -> CapturedAdapter:
        """Copy the adapter's tensors; see `trainer.export.peft_adapter`."""
        dtype = self.dtype or self._policy.base.dtype
        return capture_adapter(self._policy.model, dtype=dtype, spread=self._spread)

    def score(self, probes: Probes) -> ProbeScores:
        """Compute the trainer's own log-probs of the probes."""
        try:
            return score_probes(self._policy.model, probes, self._device)
        finally:
            self._spread.settle(self._policy.model)

    @property
    def dtype(self) -> torch.dtype | None:
        """The type that weights are cast to. None: each has the type that it has in the base."""
        dtype: torch.dtype | None = None
        if self._settings.dtype != "auto":
            dtype = getattr(torch, self._settings.dtype)
        return dtype

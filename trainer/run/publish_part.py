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
from trainer.model.weight_copy import WeightCopy
from trainer.model.weight_stream import WeightStream
from trainer.publish import Probes, ProbeScores, make_probes, score_probes
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
        self._copy: WeightCopy | None = None
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
            )
        except CheckpointError as error:
            raise ConfigurationError(f"publish.transport {self._settings.transport}: {error}") from error

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
        self._copy = WeightCopy(self.stream)
        return partial(write_copy, stream=self.stream, copy=self._copy)

    def finish_copy(self) -> None:
        """See that the copy before has been sent, written or not; on process 0, before the next one."""
        if self._copy is not None:
            self._copy.finish()

    def send(self) -> None:
        """Take part in what process 0 writes, on the others; a copy is sent in a thread of its own."""
        if not self._settings.overlap:
            self.stream.finish()
            return
        copy = WeightCopy(self.stream)

        def send() -> None:
            try:
                copy.finish()
            except Exception as error:  # noqa: BLE001 - raised in the training thread
                self._failure = error

        threading.Thread(target=send, name="publish-rows", daemon=True).start()

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

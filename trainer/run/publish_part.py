"""The part of every process in a publish: copies of weights, and log-probs of the probes.

With whole weights process 0 does it alone. Where weights are spread over processes, the others do it too, as
process 0 announces it: they send their rows, and take part in the passes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch

from trainer.config import TrainerConfig
from trainer.errors import CheckpointError, ConfigurationError
from trainer.export.hf_model import capture_model
from trainer.export.peft_adapter import CapturedAdapter, capture_adapter
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
        """Copy the weights; see `capture_model`. On processes other than 0: send them, for whatever use."""
        return capture_model(self.stream)

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

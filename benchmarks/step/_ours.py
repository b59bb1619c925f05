"""Our own step, as the training loop makes it, and the floors under it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.step._cases import Case, FoldedGroup
from benchmarks.step._contender import Contender, Setting, UnavailableError, autocast
from schemas import BatchReply
from trainer.config import TrainerConfig, load_config
from trainer.errors import ConfigurationError
from trainer.packing import MicroBatch
from trainer.run.optimizer_step import StepRunner
from trainer.run.train_state import PreparedRun, prepare_run
from trainer.samples.prepare import PreparedBatch, prepare_batch

__all__ = ["Floor", "FloorWithoutHead", "Ours", "Recomputing"]


class Ours(Contender):
    """This library: `BatchReply`, `prepare_batch`, `StepRunner.pack`, `StepRunner.accumulate`.

    The model is what `prepare_run` makes of it. Timed: pack and accumulate; with an optimizer step,
    the whole of `StepRunner.train_on`. Validating and preparing the batch have a benchmark of their own
    and are reported beside it.

    Args:
        setting: What is equal for all.
        packing: The value of `data.packing`.
        name: What it is called; its run directory bears the name, for two runs cannot share one.
    """

    def __init__(self, setting: Setting, packing: str = "auto", name: str | None = None) -> None:
        super().__init__(setting)
        self.name = name or ("ours" if packing == "auto" else f"ours-{packing}")
        self.label = "ours" if packing == "auto" else f"ours, packing {packing}"
        try:
            self._config = run_config(setting, packing, self.name)
            self.prepared: PreparedRun = prepare_run(self._config)
        except ConfigurationError as error:
            raise UnavailableError(str(error)) from error
        self._runner = StepRunner(self._config, self.prepared)
        self._batch: PreparedBatch | None = None
        self._computed_tokens = 0

    @property
    def model(self) -> nn.Module:
        """As Accelerate wrapped it."""
        return self.prepared.model

    @property
    def computed_tokens(self) -> int:
        """Of the last step."""
        return self._computed_tokens

    def prepare(self, case: Case) -> None:
        """From the reply's bytes to samples with advantages."""
        self._batch = prepare_batch(
            BatchReply.model_validate_json(case.body),
            limits=self.prepared.policy.limits,
            data=self._config.data,
            loss=self._config.loss,
            normalizer=self.prepared.normalizer,
        )
        if self._batch.set_aside:
            raise ValueError(f"a group of case {case.name} was set aside: {self._batch.set_aside[0].reason}")

    def step(self) -> float:
        """Pack and accumulate."""
        assert self._batch is not None
        micro_batches: list[MicroBatch] = self._runner.pack(self._batch)
        self._computed_tokens = sum(micro_batch.computed_tokens for micro_batch in micro_batches)
        if self.setting.optimizer_step:
            return self._runner.train_on(micro_batches).loss
        (share,) = self._runner.share_out(micro_batches)
        return float(self._runner.accumulate(share)["loss"])


def run_config(setting: Setting, packing: str, name: str) -> TrainerConfig:
    """Make the configuration of a run that trains as the peers do."""
    return load_config(
        None,
        [
            *("--model.path", str(setting.model)),
            *("--model.gradient_checkpointing", str(setting.activation_recomputation).lower()),
            *("--data.packing", packing),
            *("--data.tokens_per_micro_batch", str(setting.micro_batch_tokens)),
            *("--loss.name", "ppo_clip"),
            *("--loss.reduction", "sequence"),
            *("--train.output_dir", str(setting.scratch / f"run-{name}")),
            *("--train.device", "cpu" if setting.device.type == "cpu" else "auto"),
            *("--train.mixed_precision", "no" if setting.dtype == torch.float32 else "bf16"),
        ],
        environment={},
    )


class Recomputing(Ours):
    """The same with activations recomputed in the backward pass, as the example trainer's loader has it."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(replace(setting, activation_recomputation=True), name="recomputing")
        self.label = "ours, recomputing activations"


class Floor(Contender):
    """The least that any exact step must do: forward and backward over the unique tokens, and no loss.

    One row a group of its unique tokens, each row a pass of its own under plain causal attention; the model's
    body; its head at exactly the positions that trained tokens are predicted from; `logits.sum().backward()`.
    Nothing else. It is no training step (its tokens attend to wrong ones), only its amount of work: the same
    matrix products, and an attention that is never given a mask. Uses `ours`' model and autocast.
    """

    name = "floor"
    label = "floor"
    makes_gradients = False

    def __init__(self, setting: Setting, model: nn.Module) -> None:
        super().__init__(setting)
        self._model = model
        self._groups: list[FoldedGroup] = []
        self._inputs: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def model(self) -> nn.Module:
        """That of `ours`."""
        return self._model

    @property
    def computed_tokens(self) -> int:
        """The unique tokens."""
        return sum(len(group.tokens) for group in self._groups)

    def prepare(self, case: Case) -> None:
        """Token ids [1, U] and the columns [K] to predict from, of each group."""
        self._groups = case.folded
        device = self.setting.device
        self._inputs = [
            (torch.tensor([group.tokens], device=device), torch.tensor(group.predict_from, device=device))
            for group in self._groups
        ]

    def step(self) -> None:
        """Forward and backward of each row."""
        self._model.train()
        for input_ids, columns in self._inputs:
            with autocast(self.setting):
                scalar = self._scalar(input_ids, columns)
            scalar.backward()

    def _scalar(self, input_ids: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        model: Any = self._model
        logits: torch.Tensor = model(input_ids=input_ids, use_cache=False, logits_to_keep=columns).logits
        return logits.sum()


class FloorWithoutHead(Floor):
    """The same without the head: the sum of the last hidden states."""

    name = "floor-body"
    label = "floor without the head"

    def _scalar(self, input_ids: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        model: Any = self._model
        body = getattr(model, "module", model).base_model
        hidden: torch.Tensor = body(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden.sum()

"""The Atropos example trainer (`example_trainer` in the wheel `atroposlib`), called as its loop calls it.

What is called, and with what: `example_trainer.data.pad_data_to_good_offset(data, batch_size=2)` on the reply
(2 is its `TrainingConfig.batch_size`), then what its `run_training_step` does with the result: for each of
its micro-batches `example_trainer.training.compute_grpo_loss(model, tokens, labels, advantages, temperatures,
32, inference_logprobs=..., clip_eps=0.2)` (32 and 0.2 are its defaults) and `loss.backward()`. Its padding is
not timed, nor is its bookkeeping, its gradient clipping or its optimizer. Its vLLM parts are not touched.

Its model, too, as its loader makes it: `AutoModelForCausalLM.from_pretrained(...)` in bfloat16 weights (here
float32 weights where float32 is measured), `use_cache` off. Its loader always recomputes activations, which
costs time and saves memory. It is measured in both ways; the bars compare us with the faster one's time and
with the leaner one's memory.

Its loss: PPO's clip per token, mean over tokens, mean over the 2 sequences of a micro-batch, divided by 32.
Times 2 x 32 / sequences that is our `ppo_clip` with `reduction: sequence`, as long as no ratio leaves 0.8 to
1.2 (beyond, its clip for negative advantages is another function); the cases keep within.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.step._cases import Case
from benchmarks.step._contender import Contender, Setting, UnavailableError

__all__ = ["BATCH_SIZE", "ExampleTrainer", "load_example_model"]

BATCH_SIZE = 2
GRADIENT_ACCUMULATION_STEPS = 32
CLIP_EPSILON = 0.2


class ExampleTrainer(Contender):
    """See the module.

    Args:
        setting: What is equal for all; its token budget is not the example trainer's to obey.
        model: From `load_example_model`; the two ways share one.
        recompute: Recompute activations, as its loader switches it on.
    """

    def __init__(self, setting: Setting, model: nn.Module, *, recompute: bool) -> None:
        super().__init__(setting)
        self.name = "example-trainer" if recompute else "example-trainer-stored"
        self.label = "Atropos example trainer" + ("" if recompute else " (no recomputation)")
        self._recompute = recompute
        self._model = model
        self._pad, self._loss = _functions()
        self._micro_batches: list[tuple[torch.Tensor, ...]] = []
        self._sequences = 0

    @property
    def model(self) -> nn.Module:
        """Its own."""
        return self._model

    @property
    def computed_tokens(self) -> int:
        """Padding included."""
        return sum(batch[0].numel() for batch in self._micro_batches)

    @property
    def gradient_scale(self) -> float:
        """See the module."""
        return BATCH_SIZE * GRADIENT_ACCUMULATION_STEPS / self._sequences

    def prepare(self, case: Case) -> None:
        """Its own padding, which changes the data it is given."""
        self._sequences = len(case.rows)
        batches = self._pad(json.loads(case.body), BATCH_SIZE)
        self._micro_batches = list(zip(*batches, strict=True))

    def step(self) -> float:
        """As in its `run_training_step`, up to the gradients."""
        model: Any = self._model
        if self._recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            model.activation_checkpointing_disable()
        model.train()
        total = 0.0
        device = self.setting.device
        for tokens, labels, advantages, temperatures, sampler in self._micro_batches:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints hints about the data
                loss, _ = self._loss(
                    model,
                    tokens.to(device),
                    labels.to(device),
                    advantages.to(device),
                    temperatures,
                    GRADIENT_ACCUMULATION_STEPS,
                    inference_logprobs=sampler,
                    clip_eps=CLIP_EPSILON,
                )
            loss.backward()
            total += loss.item()
        return total * self.gradient_scale


def load_example_model(setting: Setting) -> nn.Module:
    """The model as its loader makes it, without what needs a GPU or vLLM.

    Raises:
        UnavailableError: The example trainer is not installed.
    """
    _functions()
    model: Any = AutoModelForCausalLM.from_pretrained(
        setting.model, dtype=setting.dtype, attn_implementation="sdpa"
    )
    model.to(setting.device)
    model.config.use_cache = False
    model.enable_input_require_grads()
    return model  # type: ignore[no-any-return]


def _functions() -> tuple[Callable[..., Any], Callable[..., Any]]:
    try:
        from example_trainer.data import pad_data_to_good_offset
        from example_trainer.training import compute_grpo_loss
    except ImportError as error:
        raise UnavailableError(f"not installed: {error}") from error
    return pad_data_to_good_offset, compute_grpo_loss

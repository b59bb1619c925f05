"""TRL's GRPO loss: `GRPOTrainer._compute_loss` on our batches.

What is called: a `trl.GRPOTrainer` is made around the model (which gives it TRL's own head: log-probs in
chunks, only where completions are), its generation is never used, and its `_compute_loss` is given
micro-batches as its `_generate_and_score_completions` would make them: prompts padded at the left,
completions at the right, both to the longest of the micro-batch; `old_per_token_logps` are the sampler's;
tokens of the environment inside a conversation are left out by its `tool_mask`. `loss_type="grpo"`, `beta=0`,
`epsilon=0.2`: mean over tokens, mean over the sequences of a micro-batch, which times their share of the step
is our loss. float32 weights, and bfloat16 by autocast, as TRL does by default. Its padding is not timed.

Install it with `pip install trl`; nothing else here needs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.step._cases import Case, Row
from benchmarks.step._contender import Contender, Setting, UnavailableError
from benchmarks.step._padding import micro_batched, padded

__all__ = ["Trl"]


class Trl(Contender):
    """See the module."""

    name = "trl"
    label = "TRL's GRPO loss"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._trainer = _make_trainer(setting)
        self._micro_batches: list[tuple[dict[str, Tensor], float]] = []

    @property
    def model(self) -> nn.Module:
        """Its own: TRL replaces the forward of the model that it is given."""
        model: nn.Module = self._trainer.model
        return model

    @property
    def computed_tokens(self) -> int:
        """Padding included."""
        return sum(
            inputs["prompt_ids"].numel() + inputs["completion_ids"].numel()
            for inputs, _ in self._micro_batches
        )

    def prepare(self, case: Case) -> None:
        """Pad prompts at the left, completions at the right."""
        device = self.setting.device
        self._micro_batches = [
            (
                {name: values.to(device) for name, values in _inputs(rows).items()},
                len(rows) / len(case.rows),
            )
            for rows in micro_batched(case.rows, self.setting.micro_batch_tokens)
        ]

    def step(self) -> float:
        """Forward and backward of each micro-batch."""
        trainer = self._trainer
        trainer.model.train()
        total = 0.0
        for inputs, share in self._micro_batches:
            with trainer.compute_loss_context_manager():
                loss = trainer._compute_loss(trainer.model, inputs) * share
            loss.backward()
            total += float(loss.detach())
        trainer._metrics["train"].clear()
        return total


def _inputs(rows: list[Row]) -> dict[str, Tensor]:
    prompts = [row.tokens[: row.prompt_length] for row in rows]
    completions = [row.tokens[row.prompt_length :] for row in rows]
    reverse = [prompt[::-1] for prompt in prompts]
    inputs = {
        "prompt_ids": padded(reverse, 0).flip(1),
        "prompt_mask": padded([[1] * len(prompt) for prompt in prompts], 0).flip(1),
        "completion_ids": padded(completions, 0),
        "completion_mask": padded([[1] * len(completion) for completion in completions], 0),
        "old_per_token_logps": padded([row.sampler_logprobs[row.prompt_length :] for row in rows], 0.0),
        "advantages": torch.tensor([row.advantage for row in rows]),
    }
    if not all(all(row.trained[row.prompt_length :]) for row in rows):
        inputs["tool_mask"] = padded(
            [[int(on) for on in row.trained[row.prompt_length :]] for row in rows], 0
        )
    return inputs


def _make_trainer(setting: Setting) -> Any:
    try:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise UnavailableError("not installed (pip install trl)") from error
    model = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=_no_reward,
        args=GRPOConfig(
            output_dir=str(setting.scratch / "trl"),
            use_cpu=setting.device.type == "cpu",
            bf16=setting.dtype == torch.bfloat16,
            activation_checkpointing=setting.activation_recomputation,
            loss_type="grpo",
            beta=0.0,
            epsilon=0.2,
            report_to=[],
        ),
        train_dataset=Dataset.from_list([{"prompt": "unused"}] * 8),
        processing_class=AutoTokenizer.from_pretrained(setting.model),
    )
    trainer.current_gradient_accumulation_steps = 1  # what its training loop would have set
    return trainer


def _no_reward(completions: list[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)

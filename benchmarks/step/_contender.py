"""The common part of all contenders: load, prepare a batch, make one step, show the gradients."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.step._cases import Case

__all__ = ["Contender", "Setting", "UnavailableError", "autocast"]


class UnavailableError(Exception):
    """This contender cannot take part here; the message says why and goes into its row."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Settings equal for all contenders of a run."""

    model: Path
    """Directory of a Hugging Face checkpoint with a tokenizer."""
    dtype: torch.dtype
    """float32, or bfloat16: autocast over float32 weights (bfloat16 weights where a peer has those)."""
    device: torch.device
    micro_batch_tokens: int
    """Most tokens in one forward and backward pass, padding included."""
    activation_recomputation: bool
    optimizer_step: bool
    """Include gradient clipping and AdamW."""
    scratch: Path
    """An empty directory to write into."""


class Contender(ABC):
    """One way to compute the gradients of a batch."""

    name: str
    label: str
    """For the table."""
    makes_gradients = True
    """False for the floors: what they compute is no training step."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @abstractmethod
    def prepare(self, case: Case) -> None:
        """Turn the batch into what `step` takes; timed apart from it."""

    @abstractmethod
    def step(self) -> float | None:
        """Compute the gradients of the whole batch into `model`; returns the loss where there is one."""

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """The module that holds the gradients."""

    @property
    @abstractmethod
    def computed_tokens(self) -> int:
        """Tokens of the last step that went through the model, padding included."""

    @property
    def gradient_scale(self) -> float:
        """Factor that makes its gradients those of the mean over sequences of the mean over tokens."""
        return 1.0

    def gradients(self) -> dict[str, Tensor]:
        """The last step's gradients by parameter name, float32, scaled to the common definition."""
        return {
            name.removeprefix("module."): parameter.grad.float() * self.gradient_scale
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }

    def forget(self) -> None:
        """Drop the gradients, so that the next step's memory includes them."""
        self.model.zero_grad(set_to_none=True)


def autocast(setting: Setting) -> contextlib.AbstractContextManager[Any]:
    """The context that Accelerate wraps a forward pass in under the same mixed precision."""
    if setting.dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(setting.device.type, dtype=setting.dtype)


def mean_of_means(per_token: Tensor, mask: Tensor, sequences: int) -> Tensor:
    """The step's share of a micro-batch [B, T]: each row's mean over its mask, summed, over all sequences."""
    return ((per_token * mask).sum(dim=-1) / mask.sum(dim=-1)).sum() / sequences


def clipped_surrogate(logprobs: Tensor, sampler: Tensor, advantages: Tensor, epsilon: float = 0.2) -> Tensor:
    """PPO's loss per token, as `trainer.losses.ppo_clip` defines it."""
    ratio = torch.exp(logprobs - sampler)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)

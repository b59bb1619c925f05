"""AdamW for states of 8 bits and for bfloat16 weights: torchao's, with states that are spread as weights are.

A state of 8 bits is a code for each number and a scale for each block of 256 (Dettmers and others, arXiv
2110.02861). A bfloat16 weight is rounded up or down at random, in proportion to what lies between: rounded to
the nearest, most steps of a small learning rate would change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchao.optim import AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit

from trainer.model.sharding import WHOLE, Spread

_BLOCK: Final = 256
_FEWEST: Final = 4096
"""Numbers of a tensor whose states are worth it."""


class SmallAdamW(AdamW8bit):  # type: ignore[misc]  # torchao has no types
    """torchao's AdamW: states in 8 bits where a tensor can be divided into blocks, the others in float32.

    It draws random numbers, from torch's generator, only to round bfloat16 weights.

    Args:
        parameters: Those that are trained.
        eight_bit: False: all states in float32.
        spread: How they are spread over processes.
        options: As of torch's AdamW: lr, betas, eps, weight_decay.
    """

    def __init__(
        self, parameters: Iterable[Tensor], *, eight_bit: bool, spread: Spread = WHOLE, **options: Any
    ) -> None:
        self._eight_bit = eight_bit
        self._spread = spread
        super().__init__(parameters, bf16_stochastic_round=True, **options)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Change the weights, at the rate that is set, which torchao takes as a tensor only."""
        for group in self.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)
        loss: float | None = super().step(closure)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take states as they are; torch's own method would give them the type of the weights."""
        parameters = [each for group in self.param_groups for each in group["params"]]
        self.state.clear()
        for index, state in state_dict["state"].items():
            of = parameters[index]
            self.state[of] = {
                name: each if name == "step" else each.to(of.device) for name, each in state.items()
            }

    def in_8_bit(self, parameter: Tensor) -> bool:
        """Whether a weight's states are in 8 bits: where no block belongs to two processes, or to none."""
        if not self._eight_bit or parameter.numel() < _FEWEST:
            return False
        rows, parts = parameter.shape[0], self._spread.parts if isinstance(parameter, DTensor) else 1
        each, together = -(-rows // parts), rows_of_blocks(parameter)
        return rows % together == 0 and each % together == 0 and each * (parts - 1) < rows

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        """A state of zeros; called by torchao's step."""
        if not self.in_8_bit(p):
            return torch.zeros_like(p, dtype=torch.float32)
        local = p.to_local() if isinstance(p, DTensor) else p
        zeros: Tensor = OptimState8bit.zeros(local.shape, signed, _BLOCK, local.device)
        return self._spread.as_part(zeros, p)


def rows_of_blocks(parameter: Tensor) -> int:
    """The fewest rows of a tensor that make whole blocks."""
    return _BLOCK // math.gcd(_BLOCK, parameter.numel() // parameter.shape[0])


def take_apart(state: Tensor, spread: Spread) -> dict[str, Tensor]:
    """Return codes, scale and map of a state of 8 bits: rows as its own are, spread alike, and 256 values."""
    local: Any = state.to_local() if isinstance(state, DTensor) else state
    each = rows_of_blocks(state)
    return {
        "codes": spread.as_part(local.codes, state),
        "scale": spread.as_part(local.scale.view(len(local) // each, -1), state, rows=len(state) // each),
        "map": local.qmap,
    }


def put_together(own: dict[str, Tensor], parameter: Tensor, spread: Spread, *, signed: bool) -> Tensor:
    """Return the state of 8 bits that own rows of codes and scale, and the map, make."""
    state = OptimState8bit(own["codes"], own["scale"].reshape(-1), own["map"], signed)
    return spread.as_part(state, parameter)


def rounded(own: Tensor, parameter: Tensor, spread: Spread, *, signed: bool) -> Tensor:
    """Return own rows of a state in 8 bits."""
    state = OptimState8bit.zeros(own.shape, signed, _BLOCK)
    return spread.as_part(state.copy_(own), parameter)

"""From a loss's name and options in the configuration to something the loop can call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from torch import Tensor

from trainer.errors import ConfigurationError
from trainer.losses._inputs import LossInputs
from trainer.losses._options import check_options
from trainer.losses._policy_gradient import policy_gradient
from trainer.losses._ppo_clip import ppo_clip
from trainer.losses._terms import LogMetrics
from trainer.losses._weighted_sft import weighted_sft

LossName = Literal["weighted_sft", "policy_gradient", "ppo_clip"]
"""The values of ``loss.name``."""

LOSS_NAMES: tuple[LossName, ...] = get_args(LossName)
"""The same, to list in messages."""


@dataclass(frozen=True, kw_only=True)
class ResolvedLoss:
    """A loss with its options bound, and what it needs of a batch; call it with :class:`LossInputs`."""

    name: LossName
    """The name it was resolved from."""
    options: Mapping[str, float]
    """The options that were given; the loss function's defaults hold for the others."""
    function: Callable[..., tuple[Tensor, LogMetrics]]
    """The pure function behind it."""
    needs_inference_logprobs: bool
    """Whether it has an importance ratio, so that logits must be divided by the sampling temperature too."""
    needs_ref_logprobs: bool
    """Whether it has a KL penalty, so that a group without any advantage still has a gradient."""

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, LogMetrics]:
        """Return the loss (0-dim) and the metric sums."""
        return self.function(inputs, **self.options)


_FUNCTIONS: Mapping[str, Callable[..., tuple[Tensor, LogMetrics]]] = MappingProxyType(
    {"weighted_sft": weighted_sft, "policy_gradient": policy_gradient, "ppo_clip": ppo_clip}
)

_WITH_IMPORTANCE_RATIO = frozenset({"policy_gradient", "ppo_clip"})


def resolve_loss(name: LossName, **options: float) -> ResolvedLoss:
    """Look up a loss and bind its options, refusing whatever it does not know, before anything runs.

    Args:
        name: ``weighted_sft``, ``policy_gradient`` or ``ppo_clip``.
        **options: That function's keyword arguments, e.g. ``ratio_cap=2.0``.

    Raises:
        ConfigurationError: if the name, an option, or an option's value is not allowed.
    """
    function = _FUNCTIONS.get(name)
    if function is None:
        raise ConfigurationError(f"loss.name is {name!r}; allowed are {', '.join(LOSS_NAMES)}")
    parameters = inspect.signature(function).parameters.values()
    allowed = sorted(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ConfigurationError(
            f"loss {name} has no option {', '.join(unknown)}; its options are {', '.join(allowed)}"
        )
    check_options(**options)
    return ResolvedLoss(
        name=name,
        options=MappingProxyType(dict(options)),
        function=function,
        needs_inference_logprobs=name in _WITH_IMPORTANCE_RATIO,
        needs_ref_logprobs=options.get("kl_coefficient", 0.0) > 0,
    )

"""Options of our own losses and advantage estimators; nothing here loads torch, so that `--help` need not."""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """The options of a loss or an estimator: subclass it; each field's docstring is its help text."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


class KlOptions(Options):
    """Options of a loss with a penalty towards a reference model: subclass it for the loss's own."""

    kl_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the KL penalty towards the groups' ref_logprobs (k3 estimator). 0: none."""

    def has_penalty(self) -> bool:
        """Return True if reference log-probs are needed."""
        return self.kl_coefficient > 0


class PolicyGradientOptions(KlOptions):
    """Options of `policy_gradient`."""

    ratio_cap: float = Field(default=2.0, gt=0)
    """Largest importance ratio; larger ones are truncated to it. 2 lets it at most double a token's say."""


class PpoClipOptions(KlOptions):
    """Options of `ppo_clip`."""

    epsilon_low: float = Field(default=0.2, gt=0, lt=1)
    """The ratio is clipped from below at 1 - epsilon_low, where a negative advantage stops pushing."""
    epsilon_high: float = Field(default=0.2, gt=0)
    """The ratio is clipped from above at 1 + epsilon_high, where a positive advantage stops pushing."""


LOSS_OPTIONS: Final[dict[str, type[Options]]] = {
    "weighted_sft": KlOptions,
    "policy_gradient": PolicyGradientOptions,
    "ppo_clip": PpoClipOptions,
}
ESTIMATOR_OPTIONS: Final[dict[str, type[Options]]] = {
    "group_norm": Options,
    "group_center": Options,
    "leave_one_out": Options,
    "raw": Options,
}
"""Of ours, by name, for help texts; the function itself says the same."""

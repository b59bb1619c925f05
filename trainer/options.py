"""Options of our own losses and advantage estimators; nothing here loads torch, so that `--help` need not."""

from __future__ import annotations

from typing import Final, Literal

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


KlEstimator = Literal["k1", "k2", "k3", "k3_gradient_k2", "k3_unbiased"]


class KlOptions(Options):
    """Options of a loss with a penalty towards a reference model: subclass it for the loss's own."""

    kl_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the KL penalty towards the reference model, see loss.reference. 0: none."""
    kl_estimator: KlEstimator = "k3"
    """Estimate of the KL divergence of a token, with x = log(reference / policy). k1: -x. k2: x^2 / 2. k3:
    e^x - 1 - x (GRPO). k3_gradient_k2: k3's value with k2's gradient. k3_unbiased: k3 times the importance
    ratio of trainer and sampler, with its gradient (DeepSeek-V3.2)."""
    kl_cap: float | None = Field(default=None, gt=0)
    """Largest KL estimate of a token; one beyond it has no gradient. None: only x is bounded, to 20."""

    def has_penalty(self) -> bool:
        """Return True if reference log-probs are needed."""
        return self.kl_coefficient > 0

    def needs_sampler(self) -> bool:
        """Return True if the penalty uses the sampler's log-probs."""
        return self.has_penalty() and self.kl_estimator == "k3_unbiased"


class ClipOptions(KlOptions):
    """Options of a loss whose importance ratio is clipped on both sides."""

    epsilon_low: float = Field(default=0.2, gt=0, lt=1)
    """The ratio is clipped from below at 1 - epsilon_low, where a negative advantage stops pushing."""
    epsilon_high: float = Field(default=0.2, gt=0)
    """The ratio is clipped from above at 1 + epsilon_high, where a positive advantage stops pushing."""

    @property
    def lowest(self) -> float:
        """Lower bound of the ratio."""
        return 1.0 - self.epsilon_low

    @property
    def highest(self) -> float:
        """Upper bound of the ratio."""
        return 1.0 + self.epsilon_high


class PolicyGradientOptions(KlOptions):
    """Options of `policy_gradient`."""

    ratio_cap: float = Field(default=2.0, gt=0)
    """Largest importance ratio; larger ones are truncated to it. 2 lets it at most double a token's say."""


class CispoOptions(KlOptions):
    """Options of `cispo`."""

    epsilon_low: float = Field(default=1.0, gt=0, le=1)
    """The importance weight is at least 1 - epsilon_low. 1: no lower bound."""
    epsilon_high: float = Field(default=4.0, gt=0)
    """The importance weight is at most 1 + epsilon_high."""


class PpoClipOptions(ClipOptions):
    """Options of `ppo_clip`."""

    dual_clip: float | None = Field(default=None, gt=1)
    """With a negative advantage the term is at most dual_clip times it, however likely the token became; 3 is
    usual. None: not bounded."""
    two_sided: float | None = Field(default=None, gt=1)
    """The ratio itself is at most this, above 1 + epsilon_high: also under a negative advantage, one beyond
    it has no gradient; 4 is usual. None: not bounded."""


class SequenceClipOptions(ClipOptions):
    """Options of a loss that clips a sequence's mean ratio, which stays far nearer to 1 than a token's."""

    epsilon_low: float = Field(default=3e-4, gt=0, lt=1)
    """The sequence's ratio is clipped from below at 1 - epsilon_low, under a negative advantage."""
    epsilon_high: float = Field(default=4e-4, gt=0)
    """The sequence's ratio is clipped from above at 1 + epsilon_high, under a positive advantage."""


class GspoOptions(SequenceClipOptions):
    """Options of `gspo`."""

    form: Literal["sequence", "token"] = "sequence"
    """sequence: every token of a sequence shares the gradient of the mean. token: each token keeps its own
    (GSPO-token), for advantages that differ within a sequence."""


class StdOptions(Options):
    """Options of estimators that divide by a standard deviation."""

    std: Literal["n", "n-1"] = "n"
    """What the standard deviation's sum of squares is divided by. n-1: as TRL and verl do."""


class LengthShapingOptions(Options):
    """Options of `length_shaping`."""

    weight: float = Field(default=0.1, ge=0)
    """What the longest sequence of a group loses, as a share of the group's mean score."""


LOSS_OPTIONS: Final[dict[str, type[Options]]] = {
    "weighted_sft": KlOptions,
    "policy_gradient": PolicyGradientOptions,
    "ppo_clip": PpoClipOptions,
    "gspo": GspoOptions,
    "cispo": CispoOptions,
}
ESTIMATOR_OPTIONS: Final[dict[str, type[Options]]] = {
    "group_norm": StdOptions,
    "group_center": Options,
    "leave_one_out": Options,
    "raw": Options,
    "opo": Options,
    "reinforce_plus_plus_baseline": Options,
    "pass_at_k": Options,
    "gpg": Options,
    "batch_std": StdOptions,
    "maxrl": Options,
    "length_shaping": LengthShapingOptions,
}
"""Of ours, by name, for help texts; the function itself says the same."""

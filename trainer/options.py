"""Options of our own losses and advantage estimators; nothing here loads torch, so that `--help` need not."""

from __future__ import annotations

import types
from typing import Annotated, Any, Final, Literal, Self, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)


def read_none(value: Any, annotation: Any) -> Any:
    """Return None for the word none where a field may be None and has no value of that name.

    Texts and secrets have one: a plain `str`, and a token. A path has not; ./none is one.
    """
    if not isinstance(value, str) or value.strip().lower() != "none":
        return value
    parts = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else ()
    if type(None) not in parts:
        return value
    for part in parts:
        bare = get_args(part)[0] if get_origin(part) is Annotated else part
        if part is str or bare is SecretStr or (get_origin(bare) is Literal and "none" in get_args(bare)):
            return value
    return None


class Options(BaseModel):
    """The options of a loss or an estimator: subclass it; each field's docstring is its help text."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @field_validator("*", mode="before")
    @classmethod
    def _none_is_none(cls, value: Any, info: ValidationInfo) -> Any:
        return read_none(value, cls.model_fields[str(info.field_name)].annotation)


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
    """Largest KL estimate of a token; one beyond it has no gradient, but for k2's in k3_gradient_k2 and that
    of the ratio in k3_unbiased. None: only x is bounded, to 20."""

    def has_penalty(self) -> bool:
        """Return True if reference log-probs are needed."""
        return self.kl_coefficient > 0

    def needs_sampler(self) -> bool:
        """Return True if the penalty uses the sampler's log-probs."""
        return self.has_penalty() and self.kl_estimator == "k3_unbiased"

    def trains_without_advantage(self) -> bool:
        """Return True if a sequence without any advantage has a gradient."""
        return self.has_penalty()


class CorrectionOptions(Options):
    """Weights and masks against the difference between the sampler's policy and the trainer's.

    With d = log(trainer / sampler) of a token; a weight multiplies the token's term, the denominator stays.
    """

    weight: Literal["none", "token_tis", "sequence_tis", "icepop"] = "none"
    """Importance weight. token_tis: e^d, at most ratio_cap. sequence_tis: e^(sum of d over the sequence), at
    most ratio_cap. icepop: e^d, 0 outside of icepop_low and icepop_high. A ratio that the loss has itself is
    then that to the policy before the update, as in verl and TRL: 1, so that its bounds stop nothing."""
    ratio_cap: float = Field(default=2.0, gt=0)
    """Largest weight of token_tis and sequence_tis."""
    icepop_low: float = Field(default=0.5, ge=0)
    """Smallest ratio that icepop keeps."""
    icepop_high: float = Field(default=5.0, gt=0)
    """Largest ratio that icepop keeps."""
    reject: Literal["none", "token", "sequence_sum", "sequence_mean", "sequence_max"] = "none"
    """Weight 0 where an estimate of the difference is outside of its bounds: that of each token, or the sum,
    mean or maximum over the sequence."""
    reject_estimator: Literal["k1", "k2", "k3"] = "k1"
    """The estimate. k1: -d. k2: d^2 / 2. k3: e^d - 1 - d."""
    reject_above: float = Field(default=0.7, gt=0)
    """Largest estimate that is kept, in nats."""
    reject_below: float | None = None
    """Smallest k1 that is kept. None: -reject_above."""
    off_policy_limit: float | None = Field(default=None, gt=0)
    """Weight 0 under a negative advantage where the mean of -d over the sequence is larger, in nats
    (DeepSeek-V3.2's off-policy sequence mask). None: no such mask."""

    @property
    def masks(self) -> bool:
        """True if a token may get weight 0."""
        return self.weight == "icepop" or self.reject != "none" or self.off_policy_limit is not None

    @property
    def is_active(self) -> bool:
        """True if a token may get another weight than 1."""
        return self.weight != "none" or self.masks

    @model_validator(mode="after")
    def _bounds_enclose_something(self) -> Self:
        if self.icepop_low >= self.icepop_high:
            raise ValueError(f"icepop_low {self.icepop_low} is not below icepop_high {self.icepop_high}")
        if self.reject_below is not None and self.reject_below >= self.reject_above:
            raise ValueError(
                f"reject_below {self.reject_below} is not below {self.reject_above}, reject_above"
            )
        if self.reject == "sequence_max" and self.reject_estimator == "k1":
            raise ValueError(
                "loss.correction.reject_estimator k1 may be negative, and loss.correction.reject "
                "sequence_max needs an estimate that is not: k2 or k3"
            )
        return self


class ObjectiveOptions(KlOptions):
    """Options that every loss of ours has: subclass it for a loss that ends in `finish_loss`."""

    correction: CorrectionOptions = Field(default_factory=CorrectionOptions)
    """Weights and masks against the difference between sampler and trainer."""

    def needs_sampler(self) -> bool:
        """Return True if the correction or the penalty uses the sampler's log-probs."""
        return self.correction.is_active or super().needs_sampler()


class RatioOptions(ObjectiveOptions):
    """Options of a loss that has an importance ratio of trainer and sampler: subclass it for such a loss."""

    def needs_sampler(self) -> bool:
        """Return True: the ratio does."""
        return True


class ClipOptions(RatioOptions):
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


class PolicyGradientOptions(RatioOptions):
    """Options of `policy_gradient`."""

    ratio_cap: float = Field(default=2.0, gt=0)
    """Largest importance ratio; larger ones are truncated to it. 2 lets it at most double a token's say."""


class CispoOptions(RatioOptions):
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

    @model_validator(mode="after")
    def _two_sided_lies_above_the_clip(self) -> Self:
        if self.two_sided is not None and self.two_sided <= self.highest:
            raise ValueError(
                f"two_sided {self.two_sided:g} is not above {self.highest:g}, which is 1 + epsilon_high: "
                f"raise two_sided (4 is usual), or lower epsilon_high {self.epsilon_high:g}"
            )
        return self


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


class LuspoOptions(SequenceClipOptions):
    """Options of `luspo`."""

    epsilon_low: float = Field(default=2e-3, gt=0, lt=1)
    """The sequence's ratio is clipped from below at 1 - epsilon_low, under a negative advantage."""
    epsilon_high: float = Field(default=2.5e-3, gt=0)
    """The sequence's ratio is clipped from above at 1 + epsilon_high, under a positive advantage."""


class GmpoOptions(RatioOptions):
    """Options of `gmpo`."""

    epsilon_low: float = Field(default=0.4, gt=0)
    """The log-ratio of a token is clipped from below at -epsilon_low, under a negative advantage."""
    epsilon_high: float = Field(default=0.4, gt=0)
    """The log-ratio of a token is clipped from above at epsilon_high, under a positive advantage."""


class SapoOptions(RatioOptions):
    """Options of `sapo`."""

    temperature_positive: float = Field(default=1.0, gt=0)
    """Rate at which the gradient falls as the ratio leaves 1, under a positive advantage."""
    temperature_negative: float = Field(default=1.05, gt=0)
    """The same under a negative advantage, where leaving is less stable."""


class VespoOptions(RatioOptions):
    """Options of `vespo`: a sequence's weight is e^rate w^power e^(-rate w), w its importance ratio."""

    power_positive: float = Field(default=2.0, gt=0)
    """Power under an advantage that is not negative."""
    rate_positive: float = Field(default=3.0, gt=0)
    """Rate under an advantage that is not negative."""
    power_negative: float = Field(default=3.0, gt=0)
    """Power under a negative advantage."""
    rate_negative: float = Field(default=2.0, gt=0)
    """Rate under a negative advantage."""


class DppoTvOptions(RatioOptions):
    """Options of `dppo_tv`."""

    epsilon_low: float = Field(default=0.15, gt=0)
    """Under a negative advantage a token is masked once its probability fell by more."""
    epsilon_high: float = Field(default=0.15, gt=0)
    """Under a positive advantage a token is masked once its probability rose by more."""
    ratio_cap: float = Field(default=20.0, gt=0)
    """Largest importance weight; larger ones are truncated to it."""


class DppoKlOptions(RatioOptions):
    """Options of `dppo_kl`."""

    epsilon_low: float = Field(default=0.05, gt=0)
    """Under a negative advantage a token that became rarer is masked beyond this binary KL, in nats."""
    epsilon_high: float = Field(default=0.05, gt=0)
    """Under a positive advantage a token that became likelier is masked beyond this binary KL, in nats."""
    ratio_cap: float = Field(default=20.0, gt=0)
    """Largest importance weight; larger ones are truncated to it."""


class PenalizedOptions(RatioOptions):
    """Options of a loss with a penalty on the difference between trainer and sampler."""

    mismatch_penalty: float = Field(default=1e-3, ge=0)
    """Weight of the squared log-ratio of trainer and sampler, of every trained token."""
    ratio_cap: float | None = Field(default=None, gt=0)
    """Largest importance ratio, in value and gradient; larger ones are truncated to it. None: not bounded."""

    def trains_without_advantage(self) -> bool:
        """Return True if a sequence without any advantage has a gradient."""
        return self.mismatch_penalty > 0 or super().trains_without_advantage()


class PrimeOptions(PenalizedOptions):
    """Options of `prime`."""

    epsilon_low: float = Field(default=0.2, gt=0)
    """Under a negative advantage a token is masked once its probability fell by more."""
    epsilon_high: float = Field(default=0.2, gt=0)
    """Under a positive advantage a token is masked once its probability rose by more."""


class IpoOptions(PenalizedOptions):
    """Options of `ipo`."""

    epsilon: float = Field(default=0.1, gt=0)
    """A token is masked once its probability changed by more, in either direction."""


class DecoupledPpoOptions(ClipOptions):
    """Options of `decoupled_ppo`."""

    ratio_cap: float | None = Field(default=None, gt=0)
    """Largest weight of the proximal policy against the sampler's; larger ones are truncated to it. None: not
    bounded."""
    proximal: Literal["recomputed", "interpolated"] = "recomputed"
    """The proximal policy. recomputed: that of the weights before the update, which is the policy itself in
    the only update of a batch: nothing is clipped. interpolated: estimated to be one version older than the
    policy, between it and the sampler by the batch's age: the clip bounds what one version changed."""


class ClipCovOptions(ClipOptions):
    """Options of `clip_cov`."""

    covariance_share: float = Field(default=2e-4, gt=0, le=1)
    """Largest share of the step's trained tokens that lose their gradient; at least one token."""
    covariance_low: float = 1.0
    """Only tokens whose covariance of advantage and log-prob is above it."""
    covariance_high: float = 5.0
    """Only tokens whose covariance of advantage and log-prob is below it."""

    @model_validator(mode="after")
    def _bounds_enclose_something(self) -> Self:
        if self.covariance_low >= self.covariance_high:
            raise ValueError(
                f"covariance_low {self.covariance_low} is not below covariance_high {self.covariance_high}"
            )
        return self


class KlCovOptions(RatioOptions):
    """Options of `kl_cov`."""

    covariance_share: float = Field(default=2e-4, gt=0, le=1)
    """Share of the step's trained tokens, those of the largest covariance, that are penalised; at least
    one."""
    covariance_penalty: float = Field(default=1.0, gt=0)
    """Weight of their penalty, the absolute log-ratio of trainer and sampler."""

    def trains_without_advantage(self) -> bool:
        """Return True: the penalised tokens have a gradient."""
        return True


class StdOptions(Options):
    """Options of estimators that divide by a standard deviation."""

    std: Literal["n", "n-1"] = "n"
    """Divisor of the standard deviation's sum of squares. n-1: as TRL and verl do."""


class LengthShapingOptions(Options):
    """Options of `length_shaping`."""

    weight: float = Field(default=0.1, ge=0)
    """Loss of the longest sequence of a group, as a share of the group's mean score."""


# Ours by name, in the order in which help texts have them; each is a function of `trainer.losses` or
# `trainer.samples.advantages`, which says the same of its options.
LOSS_OPTIONS: Final[dict[str, type[Options]]] = {
    "weighted_sft": ObjectiveOptions,
    "policy_gradient": PolicyGradientOptions,
    "ppo_clip": PpoClipOptions,
    "gspo": GspoOptions,
    "cispo": CispoOptions,
    "decoupled_ppo": DecoupledPpoOptions,
    "sapo": SapoOptions,
    "gmpo": GmpoOptions,
    "luspo": LuspoOptions,
    "vespo": VespoOptions,
    "dppo_tv": DppoTvOptions,
    "dppo_kl": DppoKlOptions,
    "prime": PrimeOptions,
    "ipo": IpoOptions,
    "clip_cov": ClipCovOptions,
    "kl_cov": KlCovOptions,
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

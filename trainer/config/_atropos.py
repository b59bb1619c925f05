"""The way of the data up to the loss: sections `atropos`, `journal`, `data`, `loss`."""

from __future__ import annotations

import ssl
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import httpx
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    SecretStr,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from trainer.config._base import CommaPair, PathOrHubId, Section
from trainer.config._presets import PRESETS, PresetName
from trainer.extensions import (
    BUILT_IN_ESTIMATORS,
    BUILT_IN_LOSSES,
    AdvantageEstimator,
    BoundEstimator,
    BoundLoss,
    Loss,
    same_name,
)

PositiveSeconds = Annotated[float, Field(gt=0)]


def require_http_url(url: str) -> str:
    """Return `url` without a trailing slash; refuse what is not http:// or https://, and credentials.

    The messages do not repeat it: it may hold a password.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError("it is not a URL; it must start with http:// or https://")
    try:
        parts = urlsplit(url)
        has_host = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # which repeats it
        has_host = False
    if not has_host:
        raise ValueError("it names no host, or a port that is none (1 to 65535)")
    # A password in a URL ends in logs, checkpoints and experiment trackers.
    if "@" in parts.netloc:
        raise ValueError("a URL must not hold a user or a password; use the settings token or headers")
    if parts.query or parts.fragment:
        raise ValueError("a base URL must not have a query or a fragment")
    return url.rstrip("/")


def plain_url(url: str) -> str:
    """Return a URL as messages show it and as servers are told apart: normalized, without credentials."""
    return str(httpx.URL(url).copy_with(username=None, password=None)).rstrip("/")


def _require_header_value(secret: SecretStr) -> SecretStr:
    """Refuse what could end a header and begin another one; the message does not repeat the secret."""
    value = secret.get_secret_value()
    if not (value.isascii() and value.isprintable()):
        raise ValueError("it holds a character that cannot stand in an HTTP header")
    return secret


HeaderSecret = Annotated[SecretStr, AfterValidator(_require_header_value)]


class AtroposSettings(Section):
    """The Atropos API server that scored rollouts are fetched from."""

    url: str = "http://127.0.0.1:8000"
    """Base URL of the Atropos API."""
    batch_size: int = Field(default=64, gt=0)
    """Sequences in one batch; registered with the API. Every group size must divide it."""
    max_token_length: int = Field(default=2048, gt=1)
    """Longest sequence, in tokens, that environments may send; registered with the API."""
    environment_checkpoint_dir: Path | None = None
    """Directory in which environments keep checkpoints of their own, every checkpoint.every batches;
    registered with the API as an absolute path. None: they keep none."""
    prefetch: int = Field(default=1, ge=0)
    """Batches held beyond the one in training. 0: fetch only when the trainer waits. More hides latency and
    costs staleness."""
    token: HeaderSecret | None = None
    """Bearer token for an API behind a proxy. Give it by environment variable, not in a file."""
    headers: dict[str, HeaderSecret] = Field(default_factory=dict)
    """Further HTTP headers for every request."""
    ca_file: Path | None = None
    """Certificate authorities (PEM) to trust. None: the system's."""
    connect_timeout: PositiveSeconds = 10.0
    """Seconds to wait for a connection."""
    read_timeout: PositiveSeconds = 300.0
    """Seconds without a byte before a reply counts as lost. Generous: a lost reply is a lost batch."""
    max_body_bytes: int = Field(default=1 << 30, gt=0)
    """Largest reply, in bytes after decompression, that is accepted."""
    ready_timeout: PositiveSeconds = 600.0
    """Seconds to wait at the start for the API to answer at all."""
    heartbeat_every: PositiveSeconds = 60.0
    """Seconds of waiting for a batch between two log lines that say who is late."""
    batch_timeout: PositiveSeconds = 7200.0
    """Seconds without a batch after which the run stops, with a checkpoint, naming who is late."""

    check_url = field_validator("url")(require_http_url)

    @field_validator("ca_file")
    @classmethod
    def _can_be_trusted(cls, path: Path | None) -> Path | None:
        try:
            ssl.create_default_context(cafile=path)
        except OSError as error:  # an SSLError as well
            raise ValueError(f"no certificate authorities can be read from it: {error.strerror}") from error
        return path


class JournalSettings(Section):
    """Every batch on the disk, in <output_dir>/journal, before anything is done with it."""

    accept_loss: bool = False
    """For one start: go on although the journal is missing or lacks what was written to it, without the
    batches that were only there."""
    enabled: bool = True
    """Keep fetched batches in the run's directory. false: in a temporary one, a crash costs what is there."""
    max_bytes: int = Field(default=64 << 30, ge=64 << 20)
    """Most bytes that it may take on the disk; the run stops before a batch that may not fit."""
    min_free_bytes: int = Field(default=512 << 20, ge=0)
    """Bytes that stay free on its file system, for checkpoints; the run stops before the next batch."""
    prune: bool = True
    """Delete bodies that no kept checkpoint needs. false: keep all, to replay the run from its beginning."""
    shutdown_timeout: PositiveSeconds = 60.0
    """Seconds that a poll under way may still take when the trainer stops or was killed."""


class DataSettings(Section):
    """From scored groups to micro-batches."""

    advantage_estimator: str = "group_norm"
    """Makes advantages of scores where a group carries no token-level advantages. group_norm: (score -
    mean) / standard deviation (GRPO). group_center: score - mean (Dr. GRPO). leave_one_out: score - mean of
    the others (RLOO). raw: the score. opo: score - mean weighted by length. maxrl: (score - mean) / mean.
    pass_at_k: the best sequence's lead. length_shaping: score - mean, less for long ones.
    reinforce_plus_plus_baseline, gpg, batch_std: over the whole batch, too. Or your own, as module:function;
    see docs/advantages.md."""
    advantage_options: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    """Options of the estimator, by name."""
    advantage_normalization: Literal["none", "batch", "global"] = "none"
    """Divide by the standard deviation over the trained tokens of the step (batch) or of the run so far
    (global). Never shifts: a zero stays zero."""
    advantage_clip: CommaPair[float] | None = None
    """Lowest and highest advantage after normalization. None: no clipping."""
    advantage_limit: float | None = Field(default=1e6, gt=0)
    """Groups with an advantage of a larger magnitude at a trained token, before normalization, are set aside:
    one of them would decide the whole step, and under global normalization every later one. None: any."""
    reward_kl_coefficient: float = Field(default=0.0, ge=0)
    """KL in the reward: a sequence's score loses so much times the sum over its trained tokens of sampler's
    minus reference's log-prob, before it becomes advantages. Needs inference_logprobs and ref_logprobs in
    every group; a reference computed here (loss.reference) comes too late for it. 0: none."""
    sampling_temperature: float = Field(default=1.0, ge=0.01, le=100)
    """Temperature that environments sample at, for groups that do not say it (few do). Losses with an
    importance ratio divide logits by it."""
    sampling_temperature_of: dict[int, Annotated[float, Field(ge=0.01, le=100)]] = Field(default_factory=dict)
    """The same for single environments, by the number that the API gave them: 0 for the first to register."""
    packing: Literal["auto", "prefix_tree", "plain", "padded"] = "auto"
    """Layout of sequences in a micro-batch. prefix_tree: no padding, tokens that sequences of a group share
    at their start are computed once. plain: no padding, sequences one after another. padded: one row a
    sequence. auto: the first of them that the model can take, by a test at the start."""
    tokens_per_micro_batch: int = Field(default=4096, gt=0)
    """Most tokens computed in one forward and backward pass; memory grows with it, results do not change."""
    max_sequence_length: int | None = Field(default=None, gt=1)
    """Longest sequence to train on, in tokens; longer ones are set aside. None: the model's context."""

    @field_validator("advantage_estimator")
    @classmethod
    def _is_an_estimator(cls, name: str) -> str:
        if name not in BUILT_IN_ESTIMATORS:
            AdvantageEstimator.find(name)
        return name

    @field_validator("advantage_options")
    @classmethod
    def _are_those_of_the_estimator(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        name = info.data.get("advantage_estimator")  # None if that is wrong itself
        if name is None or (name in BUILT_IN_ESTIMATORS and not given):
            return given
        estimator: AdvantageEstimator[Any] = AdvantageEstimator.find(name)
        options: dict[str, Any] = estimator.read_options(given).model_dump()
        return options

    @field_serializer("advantage_options")
    def _with_every_option(self, given: dict[str, Any]) -> dict[str, Any]:
        """Options that were not given too: a checkpoint is compared with them."""
        return self.bound_estimator.options.model_dump() | given

    @cached_property
    def bound_estimator(self) -> BoundEstimator:
        """The estimator with its options."""
        estimator: AdvantageEstimator[Any] = AdvantageEstimator.find(self.advantage_estimator)
        return estimator.bind(estimator.read_options(self.advantage_options))

    @model_validator(mode="after")
    def _clip_is_ordered(self) -> Self:
        if self.advantage_clip is not None:
            low, high = self.advantage_clip
            if not (low <= 0 <= high and low < high):
                raise ValueError(
                    f"advantage_clip must be [low, high] around 0, e.g. [-5, 5], got [{low}, {high}]"
                )
        return self


class LossSettings(Section):
    """The objective; the options of the chosen loss stand here too."""

    model_config = ConfigDict(extra="allow")  # its options, which are checked below

    preset: PresetName | None = None
    """The objective of a paper: sets the loss with its bounds, the reduction, and the advantage estimator
    with its options (docs/advantages.md#presets). A setting by hand wins if it is in the same layer (file,
    environment, command line) or a higher one; over lower layers the preset wins. None: each has its
    default."""
    name: str = "weighted_sft"
    """weighted_sft: cross-entropy times advantage. policy_gradient: the same with a truncated importance
    ratio between trainer and sampler. ppo_clip: the clipped surrogate of PPO. All: docs/objectives.md. Or
    your own, as module:function; see docs/extending.md."""
    reduction: Literal["token", "sequence", "constant", "token_sum"] = "token"
    """Denominator of the step's loss. token: the step's trained tokens. sequence: each sequence's own trained
    tokens, then the number of sequences (GRPO). constant: sequences x constant_length (Dr. GRPO).
    token_sum: 1, so that a step with more tokens has a larger gradient."""
    constant_length: int = Field(default=1024, gt=0)
    """Tokens a sequence counts for with reduction = constant."""
    apply_temperature: bool | None = None
    """Divide logits by the sampling temperature before taking log-probs. None: yes for the losses that use
    the sampler's log-probs, no for the others."""

    reference: Literal["batch", "base"] | PathOrHubId = Field("batch", union_mode="left_to_right")
    """Where a reference model's log-probs come from, for losses that have a KL penalty, and for the metric
    kl_ref. batch: the groups' ref_logprobs. base: computed here, by the base weights under the adapters, or,
    without model.lora, by a second, frozen copy of model.path. Else the path or hub id of a frozen model."""
    entropy_coefficient: float = Field(default=0.0, ge=0)
    """Weight of a bonus for the policy's entropy. With entropy_target, its first value."""
    entropy_target: float | None = Field(default=None, gt=0)
    """Entropy in nats a token towards which the coefficient is adapted: it rises by entropy_step after a step
    below it, falls after one above it, and there is no bonus while the entropy is above. None: fixed."""
    entropy_step: float = Field(default=0.005, gt=0)
    """By how much entropy_target moves the coefficient a step."""
    top_entropy_share: float = Field(default=1.0, gt=0, le=1)
    """Train only on this share of a step's trained tokens, those with the highest entropy; the others have
    advantage 0. Needs one more pass, without gradient. 1: all."""

    max_staleness: int | None = Field(default=None, ge=0)
    """Skip a batch whose samples may be more versions old than this; its groups count in stale_groups_total.
    A batch is as old as the version that was served when it arrived; one of an unknown version is trained.
    None: any age."""
    staleness_discount: float = Field(default=1.0, gt=0, le=1)
    """The loss of a batch is multiplied by this to the power of its age in versions. 1: not."""

    @field_validator("name")
    @classmethod
    def _is_a_loss(cls, name: str) -> str:
        if name in BUILT_IN_LOSSES:
            return name
        preset = same_name(name, PRESETS)
        if preset is not None and same_name(name, BUILT_IN_LOSSES) is None:
            raise ValueError(
                f"there is no such loss: {preset} is a preset, which sets the loss and more (--loss.preset "
                f"{preset})"
            )
        Loss.find(name)
        return name

    @model_validator(mode="after")
    def _options_are_those_of_the_loss(self) -> Self:
        given = self.__pydantic_extra__
        if given:  # without any, torch need not be loaded to read a configuration
            loss: Loss[Any] = Loss.find(self.name)
            options = loss.read_options(given, also=type(self).model_fields)
            # What was not given below them stays so, to be told from what was.
            given.update(options.model_dump(include=set(given), exclude_unset=True))
        return self

    @model_serializer(mode="wrap")
    def _with_every_option(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Options that were not given too: a checkpoint is compared with them."""
        given: dict[str, Any] = dump(self)
        options = self.bound.options.model_dump()
        return options | {name: value for name, value in given.items() if name not in options}

    @cached_property
    def bound(self) -> BoundLoss:
        """The loss with its options."""
        loss: Loss[Any] = Loss.find(self.name)
        return loss.bind(loss.read_options(self.__pydantic_extra__ or {}))

    @property
    def needs_inference_logprobs(self) -> bool:
        """True if the loss uses the sampler's log-probs."""
        return self.bound.needs_inference_logprobs

    @property
    def user_of_inference_logprobs(self) -> str | None:
        """Names the part that uses the sampler's log-probs, for messages; None if nothing does."""
        if not self.needs_inference_logprobs:
            return None
        if self.name != "weighted_sft":
            return f"loss.name {self.name}"
        correction = getattr(self.bound.options, "correction", None)
        if correction is not None and correction.is_active:
            return "loss.correction"
        return "loss.kl_estimator k3_unbiased"

    @property
    def needs_ref_logprobs_of_groups(self) -> bool:
        """True if groups without a reference model's log-probs cannot be trained on."""
        return self.bound.needs_ref_logprobs and self.reference == "batch"

    @property
    def rewards_entropy(self) -> bool:
        """True if there is an entropy bonus, or may be one later in the run."""
        return self.entropy_coefficient > 0 or self.entropy_target is not None

    @property
    def trains_without_advantage(self) -> bool:
        """True if sequences whose advantages are all 0 have a gradient all the same."""
        return self.bound.trains_without_advantage or self.rewards_entropy

    @property
    def uses_temperature(self) -> bool:
        """True if logits are divided by the sampling temperature."""
        return self.needs_inference_logprobs if self.apply_temperature is None else self.apply_temperature

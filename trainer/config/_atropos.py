"""Where rollouts come from and what is made of them: sections `atropos`, `journal`, `data`, `loss`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, field_validator, model_validator

from trainer.config._base import Section

PositiveSeconds = Annotated[float, Field(gt=0)]


def require_http_url(url: str) -> str:
    """Return `url` without a trailing slash; refuse what is not http:// or https://, and credentials.

    The messages do not repeat it: it may hold a password.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError("it is not a URL; it must start with http:// or https://")
    parts = urlsplit(url)
    # A password in a URL ends in logs, checkpoints and experiment trackers.
    if "@" in parts.netloc:
        raise ValueError("a URL must not hold a user or a password; use the settings token or headers")
    if parts.query or parts.fragment:
        raise ValueError("a base URL must not have a query or a fragment")
    return url.rstrip("/")


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


class JournalSettings(Section):
    """Every batch on the disk, in <output_dir>/journal, before anything is done with it."""

    enabled: bool = True
    """Fetch in a process of its own and record. false: in memory only, a crash costs the batches there."""
    max_bytes: int = Field(default=64 << 30, ge=64 << 20)
    """Most bytes that it may take on the disk; the run stops before a batch that may not fit."""
    min_free_bytes: int = Field(default=512 << 20, ge=0)
    """Bytes that stay free on its file system, for checkpoints; the run stops before the next batch."""
    prune: bool = True
    """Delete bodies that no kept checkpoint needs. false: keep all, to replay the run from its beginning."""
    farewell: PositiveSeconds = 60.0
    """Seconds that a poll under way may still take when the trainer stops or was killed."""


class DataSettings(Section):
    """From scored groups to micro-batches."""

    advantage_estimator: Literal["group_norm", "group_center", "leave_one_out", "raw"] = "group_norm"
    """How scores become advantages where a group carries no token-level advantages: (score - mean) /
    standard deviation (GRPO), score - mean (Dr. GRPO), score - mean of the others (RLOO), or the score."""
    advantage_normalization: Literal["none", "batch", "global"] = "none"
    """Divide by the standard deviation over the trained tokens of the step (batch) or of the run so far
    (global). Never shifts: a zero stays zero."""
    advantage_clip: tuple[float, float] | None = None
    """Lowest and highest advantage after normalization. None: no clipping."""
    advantage_limit: float | None = Field(default=1e6, gt=0)
    """Groups with an advantage of a larger magnitude at a trained token, before normalization, are set aside:
    one of them would decide the whole step, and under global normalization every later one. None: any."""
    packing: Literal["auto", "prefix_tree", "plain", "padded"] = "auto"
    """How sequences share a micro-batch. prefix_tree: no padding, tokens that sequences of a group share
    at their start are computed once. plain: no padding, sequences one after another. padded: one row a
    sequence. auto: the first of them that the model can take, by a test at the start."""
    tokens_per_micro_batch: int = Field(default=4096, gt=0)
    """Most tokens computed in one forward and backward pass; memory grows with it, results do not change."""
    max_sequence_length: int | None = Field(default=None, gt=1)
    """Longest sequence to train on, in tokens; longer ones are set aside. None: the model's context."""

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
    """The objective."""

    name: Literal["weighted_sft", "policy_gradient", "ppo_clip"] = "weighted_sft"
    """weighted_sft: cross-entropy times advantage. policy_gradient: the same with a truncated importance
    ratio between trainer and sampler. ppo_clip: the clipped surrogate of PPO."""
    reduction: Literal["token", "sequence", "constant"] = "token"
    """What the step's sum is divided by. token: the step's trained tokens. sequence: each sequence by its
    own trained tokens, then by the number of sequences (GRPO). constant: sequences x constant_length
    (Dr. GRPO)."""
    constant_length: int = Field(default=1024, gt=0)
    """Tokens a sequence counts for with reduction = constant."""
    ratio_cap: float = Field(default=2.0, gt=0)
    """policy_gradient: largest importance ratio; larger ones are truncated to it."""
    epsilon_low: float = Field(default=0.2, gt=0, lt=1)
    """ppo_clip: the ratio is clipped from below at 1 - epsilon_low."""
    epsilon_high: float = Field(default=0.2, gt=0)
    """ppo_clip: the ratio is clipped from above at 1 + epsilon_high."""
    kl_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the KL penalty towards the groups' ref_logprobs (k3 estimator). 0: none."""
    apply_temperature: bool | None = None
    """Divide logits by the sampling temperature before taking log-probs. None: yes for the losses with an
    importance ratio, no for weighted_sft."""

    @property
    def needs_inference_logprobs(self) -> bool:
        """Whether the loss compares the trainer's log-probs with the sampler's."""
        return self.name != "weighted_sft"

    @property
    def uses_temperature(self) -> bool:
        """Whether logits are divided by the sampling temperature."""
        return self.needs_inference_logprobs if self.apply_temperature is None else self.apply_temperature

"""Settings of the way of new weights to the inference servers: section `publish`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from trainer.config._atropos import HeaderSecret, PositiveSeconds, require_http_url
from trainer.config._base import CommaList, Section


class DeltaSettings(Section):
    """With `publish.transport` delta: what is sent, and how servers elsewhere get it."""

    anchor_every: int = Field(default=20, gt=0)
    """Publishes from one full version to the next; what changed travels in between. 1: always full."""
    snapshot: Literal["cpu", "device"] = "cpu"
    """Where the copy of the published weights is kept. device: beside the model; comparing is then fastest,
    done while training stands still, and takes the size of the published weights of the accelerator's
    memory."""
    port: int | None = Field(default=None, ge=0, le=65535)
    """TCP port on which servers fetch published files. 0: any free one. None: they read publish.directory."""
    host: str = "127.0.0.1"
    """Address that it listens on."""
    token: HeaderSecret | None = None
    """Bearer token that servers have to present. Give it by environment variable, not in a file."""

    @model_validator(mode="after")
    def _port_has_a_token(self) -> Self:
        if self.port is not None and self.token is None:
            raise ValueError(
                "port is set, and token is not: whoever reaches the port could read the weights. Set it in "
                "the environment, as ATROPOS_TRAINER_PUBLISH__DELTA__TOKEN"
            )
        return self


class PublishSettings(Section):
    """Publishing weights and proving that they are served."""

    transport: Literal["none", "disk", "delta", "lora", "nccl", "ipc"] = "none"
    """none: train only. disk: write a checkpoint directory that the servers reload; they must see the
    same path. delta: write only what changed (vLLM with our worker extension; others as with disk). lora:
    write only the adapter (model.lora), which the servers load under a fresh name. nccl: send the weights
    over the GPUs' network (vLLM only). ipc: hand them over inside one GPU (vLLM only)."""
    engine: Literal["vllm", "sglang"] = "vllm"
    """The inference servers' engine. sglang: over `disk`, also for merged adapters; not yet run against a
    real SGLang."""
    servers: CommaList[str] = Field(default_factory=list)
    """Base URLs of the inference servers that the environments sample from."""
    every: int = Field(default=1, gt=0)
    """Optimizer steps between two publishes."""
    directory: Path | None = None
    """Where versioned weight directories go. None: <train.output_dir>/published."""
    readable_by: Literal["owner", "group", "everyone"] = "owner"
    """Who may read published directories; the inference servers have to, and may be another user's."""
    keep: int = Field(default=2, gt=0)
    """Newest versions kept on disk."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the published weights. auto: the type in which the base checkpoint is stored."""
    pause_mode: Literal["keep", "wait", "abort"] = "keep"
    """Requests in flight. keep: freeze, go on with the new weights. wait: drain before the pause. abort:
    cancel."""
    overlap: bool = True
    """Write, load and verify a version in the background while the next step trains, where the transport can
    (disk, delta, lora). Off: the next step waits until the version is proven, and disk and delta copy no more
    than a weight at a time."""
    on_failure: Literal["abort", "continue_without", "retry_until"] = "retry_until"
    """When a server does not take a version. abort: the run ends. retry_until: publish to it again, until
    `retry_seconds` are over, then end. continue_without: the same, but then go on with the servers that are
    left, as long as there is one; the lost one gets the current version when it is back."""
    retry_seconds: PositiveSeconds = 600.0
    """Seconds for repeating a publish to servers that failed, e.g. while they are restarted."""
    watch_interval: PositiveSeconds = 5.0
    """Seconds between two looks at the servers, outside a publish: one that was restarted gets the current
    version again."""
    lora_fallback: Literal["merged", "refuse"] = "merged"
    """With `lora`, for a server that takes no adapters: publish merged weights over `disk`, or refuse to
    start."""
    delta: DeltaSettings = Field(default_factory=DeltaSettings)
    """Full versions in between, and files for servers elsewhere."""
    bucket_mebibytes: int = Field(default=512, gt=0)
    """With `nccl` and `ipc`: largest piece that is cast and sent at once, in MiB."""
    group_address: str = "127.0.0.1"
    """With `nccl`: the address of this trainer that the servers' workers can reach."""
    group_port: int = Field(default=29600, ge=1, le=65535)
    """With `nccl`: first free TCP port for the rendezvous; server number k uses this one plus k."""
    token: HeaderSecret | None = None
    """Bearer token of the inference servers. Give it by environment variable, not in a file."""
    headers: dict[str, HeaderSecret] = Field(default_factory=dict)
    """Further HTTP headers for every request to them."""
    verify: bool = True
    """After each publish compare the servers' log-probs of fixed texts with the trainer's own."""
    logprobs: Literal["any", "raw", "scaled"] = "any"
    """Distribution that the servers' log-probs must be of at sampling temperatures other than 1: the model's
    (raw), or the one that was sampled from (scaled). Anything else then ends the run at its start. any:
    where the loss needs the other kind there is only a warning."""
    tolerance: float | None = Field(default=None, gt=0)
    """Largest mean absolute log-prob difference, in nats, that verification accepts. None: by dtype."""
    probes: list[str] | None = None
    """Texts that verification scores. None: built-in ones."""
    ready_timeout: PositiveSeconds = 600.0
    """Seconds to wait at the start for a server to become healthy."""
    pause_timeout: PositiveSeconds = 60.0
    """Seconds for pausing, resuming, cache reset and tagging, each."""
    load_timeout: PositiveSeconds = 600.0
    """Seconds for a server to load the weights."""
    verify_timeout: PositiveSeconds = 120.0
    """Seconds for a server to score the probes."""

    @field_validator("servers")
    @classmethod
    def _check_servers(cls, servers: list[str]) -> list[str]:
        return [require_http_url(server) for server in servers]

    @model_validator(mode="after")
    def _servers_are_named(self) -> Self:
        if self.transport != "none" and not self.servers:
            raise ValueError(
                f"publish.transport is {self.transport!r} but publish.servers is empty; "
                "name the inference servers, or set publish.transport to 'none'"
            )
        if self.engine == "sglang" and self.transport in ("delta", "nccl", "ipc"):
            raise ValueError(
                f"publish.transport {self.transport!r} is for vLLM; with publish.engine 'sglang' use 'disk'"
            )
        return self

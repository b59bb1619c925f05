"""How new weights reach the inference servers: section `publish`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from trainer.config._atropos import PositiveSeconds, require_http_url
from trainer.config._base import CommaList, Section


class PublishSettings(Section):
    """Publishing weights and proving that they are served."""

    transport: Literal["none", "disk"] = "none"
    """none: train only. disk: write a checkpoint directory that the servers reload; they must see the
    same path."""
    servers: CommaList[str] = Field(default_factory=list)
    """Base URLs of the inference servers that the environments sample from."""
    every: int = Field(default=1, gt=0)
    """Optimizer steps between two publishes."""
    directory: Path | None = None
    """Where versioned weight directories go. None: <train.output_dir>/published."""
    keep: int = Field(default=2, gt=0)
    """Newest versions kept on disk."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the published weights. auto: the type in which the base checkpoint is stored."""
    pause_mode: Literal["keep", "wait", "abort"] = "keep"
    """What happens to requests in flight: they wait and go on with the new weights, the pause waits for
    them to end, or they are cut off."""
    token: SecretStr | None = None
    """Bearer token of the inference servers. Give it by environment variable, not in a file."""
    verify: bool = True
    """After each publish compare the servers' log-probs of fixed texts with the trainer's own."""
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
        return self

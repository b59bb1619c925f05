"""Checks how to reach the API: address, credentials, TLS, timeouts, size limit."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from atropos_client._retry import RetryPolicy


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """Patience in seconds, one bound per phase of a request."""

    connect: float = 5.0
    """To open a connection. A live server accepts at once, even while it is busy."""
    read: float = 60.0
    """Between two pieces of a reply. The API has one thread and may be building a large batch for another
    request first."""
    batch_read: float = 600.0
    """As `read`, for ``GET /batch``: the server removes the batch before it encodes it, so giving up early
    loses data."""
    write: float = 60.0
    """Between two pieces of a request body."""
    total: float = 1800.0
    """For one whole sending. Ends a reply that keeps dripping and never finishes."""


class ConnectionSettings(BaseModel):
    """Says how to reach an Atropos API. Its repr, and its complaints, show no credential."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    url: str
    """Scheme, host, port and possibly a path prefix; no user, password, query or fragment."""
    token: SecretStr | None = None
    """Bearer token, for a proxy in front of the API that asks for one. None: none."""
    headers: dict[str, SecretStr] = Field(default_factory=dict)
    """Further headers of every request. All are treated as secrets."""
    ca_file: Path | None = None
    """Authorities that vouch for the server's certificate. None: the usual ones."""
    timeouts: Timeouts = Field(default_factory=Timeouts)
    """Patience per phase of a request."""
    max_body_bytes: int = Field(default=1 << 30, ge=1)
    """Largest reply, in bytes, before and after decompression. A batch of half a million tokens with
    log-probs is about 15 MB; distillation multiplies that."""
    retries: RetryPolicy = Field(default_factory=RetryPolicy)
    """Bounds on repeating a request."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, address: str) -> str:
        url = httpx.URL(address)
        # The message must not repeat what may hold a password.
        if url.userinfo:
            raise ValueError("the address of the API must not hold a user or password; use token or headers")
        if url.scheme not in {"http", "https"} or not url.host:
            raise ValueError(f"the address of the API must look like http://host:8000, found {address!r}")
        if url.query or url.fragment:
            raise ValueError(f"the address of the API must not have a query or fragment: {url.host}")
        return address.rstrip("/")

    @model_validator(mode="after")
    def _check_secrets(self) -> Self:
        for name, secret in [("token", self.token), *self.headers.items()]:
            value = secret.get_secret_value() if secret else ""
            # httpx would quote the value in its own complaint.
            if not (value.isascii() and value.isprintable()):
                raise ValueError(
                    f"the value of {name!r} holds a character that cannot stand in an HTTP header"
                )
        return self

    @property
    def tells_secrets(self) -> bool:
        """Whether credentials travel unencrypted to another machine."""
        url = httpx.URL(self.url)
        return bool(self.token or self.headers) and url.scheme == "http" and not is_loopback(url.host)

    def redact(self, text: str) -> str:
        """Remove every secret of ours from a text that a server sent back."""
        return redacted(text, [self.token, *self.headers.values()])

    def http_options(self) -> dict[str, Any]:
        """Return the keyword arguments of ``httpx.Client``."""
        # A request that meets a kept connection while the server closes it gets no answer, and looks like a
        # batch possibly lost. A new connection costs less than a millisecond a poll.
        return client_options(
            self.url,
            token=self.token,
            headers={"Accept": SecretStr("application/json"), **self.headers},
            limits=httpx.Limits(max_keepalive_connections=0),
        ) | {"verify": ssl.create_default_context(cafile=self.ca_file) if self.ca_file else True}

    def phase_timeouts(self, *, batch: bool) -> httpx.Timeout:
        """Return the timeouts of one request."""
        t = self.timeouts
        return httpx.Timeout(
            connect=t.connect, read=t.batch_read if batch else t.read, write=t.write, pool=t.connect
        )


def client_options(
    base_url: str,
    *,
    token: SecretStr | None,
    headers: Mapping[str, SecretStr],
    limits: httpx.Limits,
) -> dict[str, Any]:
    """Return the keyword arguments of an ``httpx.Client`` whose secrets go to no other host."""
    # Only what the body reader can bound while it decompresses.
    sent = {"Accept-Encoding": "gzip"}
    sent.update({name: value.get_secret_value() for name, value in headers.items()})
    if token is not None:
        sent["Authorization"] = f"Bearer {token.get_secret_value()}"
    return {
        "base_url": base_url,
        "headers": sent,
        "limits": limits,
        # A redirect could carry the token, or a batch, to another host.
        "follow_redirects": False,
        # Neither ~/.netrc nor a proxy variable of the shell may decide where rollouts go.
        "trust_env": False,
    }


def redacted(text: str, secrets: Iterable[SecretStr | None]) -> str:
    """Remove secrets from a text."""
    for secret in secrets:
        value = secret.get_secret_value() if secret else ""
        text = text.replace(value, "***") if value else text
    return text


def is_loopback(host: str) -> bool:
    """Tell whether a host of a URL is this machine, whatever the network."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

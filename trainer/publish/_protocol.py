"""What the shared publish procedure needs of a server and of a transport.

An `InferenceServer` is the dialect that an engine speaks (vLLM, SGLang); a `WeightTransport` is the way that
the weights take (a shared directory, an adapter, the GPUs' own network). Each is small; the order of the
calls, the deadlines and what happens after a failure are in `_procedure` and `publisher`, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class StagedWeights:
    """A version that is ready to be loaded by any number of servers."""

    version: int
    dtype: str | None
    """Name of the weights' type, e.g. `bfloat16`; None if unknown. Verification's tolerance follows it."""
    path: Path | None = None
    """Directory that holds it: a whole model, or an adapter. None: it never touches a disk."""
    served_name: str | None = None
    """Name under which the servers serve this version, where it is a name of its own (an adapter's).
    None: the model's name."""
    merged: StagedWeights | None = None
    """The same version as a whole model, for servers that take no adapter."""
    weight_bytes: int = 0
    """Size of what travels."""


@dataclass(frozen=True, kw_only=True)
class NextToken:
    """What a server says of the token after a prompt, along the path that generation takes."""

    logprobs: Mapping[int, float]
    """Token id to log-prob in nats: the sampled token and, where the server tells, the likeliest ones."""
    cached_tokens: int | None = None
    """Prompt tokens that were taken from the prefix cache; None if the server does not tell."""


class InferenceServer(Protocol):
    """One server. Every method ends within its phase's deadline or raises a `ServerFailure`."""

    @property
    def url(self) -> str:
        """Base URL without credentials."""
        ...

    def wait_until_ready(self) -> None:
        """Wait until it is healthy; find the name under which it serves the model."""
        ...

    def is_paused(self) -> bool:
        """Whether somebody, perhaps a trainer that died, has paused it."""
        ...

    def pause(self, version: int) -> None:
        """Stop generation at the next step, or after it, as configured."""
        ...

    def load_directory(self, staged: StagedWeights) -> None:
        """Replace the weights by those in a directory."""
        ...

    def reset_caches(self, version: int) -> None:
        """Forget everything that was computed with earlier weights."""
        ...

    def tag(self, version: int) -> None:
        """Label the weights; a server without labels ignores it."""
        ...

    def resume(self, version: int | None) -> None:
        """Go on generating. `version` is for messages; None outside a publish."""
        ...

    def score(
        self, token_id_lists: list[list[int]], version: int, *, served_name: str | None = None
    ) -> list[list[float]]:
        """Log-probs of tokens 1..T-1 of each list, in nats, at temperature 1.

        `served_name`: the adapter's name, if not the model itself is asked.
        """
        ...

    def next_token(
        self,
        token_ids: list[int],
        version: int,
        *,
        temperature: float = 1.0,
        served_name: str | None = None,
    ) -> NextToken:
        """Sample one token after a prompt as an environment would: through the prefix cache.

        At a temperature other than 1 the log-probs are what the server gives to environments, which may or
        may not be divided by the temperature: that is what verification wants to know.
        """
        ...

    def weight_version(self, version: int) -> str | None:
        """The label that the server shows, or None if it shows none."""
        ...

    def takes_adapters(self) -> bool:
        """Whether adapters can be loaded at run time AND reach the environments that sample from it."""
        ...

    def adapters(self, version: int) -> set[str]:
        """Names of the adapters that are loaded, or that requests in flight still sample from."""
        ...

    def load_adapter(self, name: str, path: Path, version: int) -> None:
        """Load an adapter under a name that was never used before."""
        ...

    def active_adapter(self, version: int) -> str | None:
        """The adapter that environments sample from; None: the model itself."""
        ...

    def activate_adapter(self, name: str, version: int) -> None:
        """Let environments sample from this adapter from now on, without changing their model name."""
        ...

    def use_model_itself(self) -> None:
        """Let environments sample from the model again, where an earlier trainer left an adapter active."""
        ...

    def unload_adapter(self, name: str, version: int) -> None:
        """Forget an adapter; not knowing it is no failure."""
        ...

    def world_size(self, version: int | None) -> int:
        """Number of the server's workers that take part in a transfer over a process group."""
        ...

    def weight_request(self, route: str, body: Mapping[str, Any], version: int | None) -> None:
        """One request of a weight transfer, e.g. `/update_weights`, inside the load deadline; sent once.

        `version` is for messages; None while shaking hands.
        """
        ...

    def close(self) -> None:
        """Close the connections."""
        ...


class WeightTransport(Protocol):
    """How weights get from the trainer to the servers."""

    @property
    def overlaps(self) -> bool:
        """Whether `capture` detaches the weights from the live model.

        If so the rest of a publish runs in a background thread while the next step trains; if not (weights
        are sent from the model itself) the training thread waits for the publish.
        """
        ...

    def capture(self, version: int) -> Callable[[], StagedWeights]:
        """Take the weights out of the live model, in the training thread; quick.

        Returns:
            Finishes staging (writing, hashing), from any thread.

        Raises:
            StagingFailed: Now or in the returned function: the weights cannot be read or written.
        """
        ...

    def connect(self, server: InferenceServer) -> None:
        """Shake hands with a server that has just become ready, perhaps after a restart."""
        ...

    def needs_pause(self, server: InferenceServer) -> bool:
        """Whether generation has to stand still while this server loads."""
        ...

    def served_name(self, server: InferenceServer, staged: StagedWeights) -> str | None:
        """The name to score the version under at this server; None: the model's."""
        ...

    def load(self, server: InferenceServer, staged: StagedWeights) -> None:
        """Bring the staged weights into one server. Called from one thread per server."""
        ...

    def activate(self, server: InferenceServer, staged: StagedWeights) -> None:
        """After the proof: let environments sample from it, and forget older versions on the server."""
        ...

    def is_served(self, server: InferenceServer, staged: StagedWeights) -> bool:
        """Whether the server still shows this version: False after it was restarted. Cheap."""
        ...

    def prune(self, served: int) -> None:
        """Delete old versions, but never the one that is served; called after a publish that succeeded."""
        ...

    def close(self, servers: Sequence[InferenceServer]) -> None:
        """Give back process groups and the like; servers that do not answer are no failure."""
        ...

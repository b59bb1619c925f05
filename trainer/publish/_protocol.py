"""What the shared publish procedure needs of a server and of a transport.

An `InferenceServer` is the dialect that an engine speaks (vLLM here); a `WeightTransport` is the way that
the weights take (a shared directory here). Each is small; the order of the calls, the deadlines and what
happens after a failure are in `_procedure`, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class StagedWeights:
    """A version that is ready to be loaded by any number of servers."""

    version: int
    path: Path
    """Directory that holds it."""
    dtype: str | None
    """Name of the weights' type, e.g. `bfloat16`; None if unknown. Verification's tolerance follows it."""


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

    def score(self, token_id_lists: list[list[int]], version: int) -> list[list[float]]:
        """Log-probs of tokens 1..T-1 of each list, in nats, at temperature 1."""
        ...

    def weight_version(self, version: int) -> str | None:
        """The label that the server shows, or None if it shows none."""
        ...

    def close(self) -> None:
        """Close the connections."""
        ...


class WeightTransport(Protocol):
    """How weights get from the trainer to the servers."""

    def stage(self, version: int) -> StagedWeights:
        """Prepare a version, while the servers still generate.

        Raises:
            StagingFailed: It could not be written.
        """
        ...

    def load(self, server: InferenceServer, staged: StagedWeights) -> None:
        """Bring the staged weights into one paused server. Called from one thread per server."""
        ...

    def prune(self, served: int) -> None:
        """Delete old versions, but never the one that is served; called after a publish that succeeded."""
        ...

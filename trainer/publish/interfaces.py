"""Defines what the shared publish procedure needs of a server and of a transport.

An `InferenceServer` speaks an engine's dialect (vLLM, SGLang). A `WeightTransport` is the way that the
weights take: a shared directory, an adapter, the GPUs' own network; what only one engine offers (adapters,
process groups) it asks of that engine's class. The order of the calls, the deadlines and what happens after
a failure are in `member` and `fleet`, once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from trainer.config import PublishSettings
from trainer.publish.engines.connection import ServerConnection
from trainer.publish.errors import Phase


@dataclass(frozen=True, kw_only=True)
class StagedWeights:
    """Describes a version that is ready to be loaded by any number of servers."""

    version: int
    dtype: str | None
    """Name of the weights' type, e.g. `bfloat16`; None if unknown. Verification's tolerance follows it."""
    path: Path | None = None
    """Directory that holds it as a whole model. None: no server needs that."""
    adapter: Path | None = None
    """Directory that holds it as an adapter; its name is part of the name under which servers know it."""
    weight_bytes: int = 0
    """Size of what travels."""


@dataclass(frozen=True, kw_only=True)
class NextToken:
    """Holds what a server says of the token after a prompt, along the path that generation takes."""

    logprobs: Mapping[int, float]
    """Token id to log-prob in nats: the sampled token and, where the server tells, the likeliest ones."""
    cached_tokens: int | None = None
    """Prompt tokens that were taken from the prefix cache; None if the server does not tell."""


class InferenceServer(ABC):
    """Speaks to one server. Every method ends within its phase's deadline or raises a `ServerFailure`.

    Args:
        url: Its base URL.
        settings: Section `publish` of the configuration.
    """

    remedies: ClassVar[Mapping[Phase | int, str]] = {}
    """Advice on a failure of a phase, or on a status, where it is another than with vLLM."""

    def __init__(self, url: str, settings: PublishSettings) -> None:
        seconds = dict.fromkeys(Phase, settings.pause_timeout)
        seconds |= {Phase.LOAD: settings.load_timeout, Phase.VERIFY: settings.verify_timeout}
        self._settings = settings
        self._connection = ServerConnection(
            url, token=settings.token, headers=settings.headers, seconds=seconds, remedies=self.remedies
        )
        self.url = self._connection.url
        """Base URL without credentials."""
        self.failure = self._connection.failure
        """Makes the error of a phase at this server."""

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()

    def name_in_messages(self, version: int | None) -> None:
        """Set the version that messages name from now on."""
        self._connection.version = version

    @abstractmethod
    def wait_until_ready(self) -> None:
        """Wait until it is healthy; find the name under which it serves the model."""

    @abstractmethod
    def is_paused(self) -> bool:
        """Tell whether somebody, perhaps a trainer that died, has paused it."""

    @abstractmethod
    def pause(self) -> None:
        """Stop generation at the next step, or after it, as configured."""

    @abstractmethod
    def load_directory(self, path: Path, version: int) -> None:
        """Replace the weights by those in a directory."""

    @abstractmethod
    def reset_caches(self) -> None:
        """Forget everything that was computed with earlier weights."""

    @abstractmethod
    def tag(self, version: int) -> None:
        """Label the weights; a server without labels ignores it."""

    @abstractmethod
    def resume(self) -> None:
        """Go on generating."""

    @abstractmethod
    def score(self, token_id_lists: list[list[int]], *, served_name: str | None = None) -> list[list[float]]:
        """Return the log-probs of tokens 1..T-1 of each list, in nats, at temperature 1.

        `served_name`: the adapter's name, if not the model itself is asked.
        """

    @abstractmethod
    def next_token(
        self, token_ids: list[int], *, temperature: float = 1.0, served_name: str | None = None
    ) -> NextToken:
        """Sample one token after a prompt as an environment would: through the prefix cache.

        At a temperature other than 1 the log-probs are what the server gives to environments, which may or
        may not be divided by the temperature: that is what verification wants to know.
        """

    @abstractmethod
    def weight_version(self) -> str | None:
        """Return the label that the server shows, or None if it shows none."""

    def use_model_itself(self) -> None:  # noqa: B027 - most servers know nothing else
        """Let environments sample from the model again, where an earlier trainer left an adapter active."""


class WeightTransport(ABC):
    """Brings weights from the trainer to the servers.

    The defaults are those of a transport that replaces the weights in place.
    """

    overlaps: ClassVar[bool]
    """Whether `capture` detaches the weights from the live model.

    If so the rest of a publish runs in a background thread while the next step trains; if not (weights are
    sent from the model itself) the training thread waits for the publish."""

    pauses: ClassVar[bool] = True
    """Whether generation has to stand still while a server loads."""

    @abstractmethod
    def capture(self, version: int) -> Callable[[], StagedWeights]:
        """Take the weights out of the live model, in the training thread; quick.

        Returns:
            Finishes staging (writing, hashing), from any thread.

        Raises:
            StagingFailed: Now or in the returned function: the weights cannot be read or written.
        """

    def prepare(  # noqa: B027 - most have nothing to do before the pause
        self, server: InferenceServer, staged: StagedWeights
    ) -> None:
        """Do what can be done while the server still serves the old weights. Otherwise as `load`."""

    @abstractmethod
    def load(self, server: InferenceServer, staged: StagedWeights) -> None:
        """Bring the staged weights into one server. Called from one thread per server."""

    def connect(self, server: InferenceServer) -> WeightTransport:
        """Shake hands with a server that has just become ready, perhaps after a restart.

        Returns:
            The way by which this server gets its weights: this one, or another that it falls back on.
        """
        server.use_model_itself()
        return self

    def served_name(self, server: InferenceServer) -> str | None:
        """Return the name to score the version under that this server has loaded; None: the model's."""
        return None

    def activate(  # noqa: B027 - what is loaded in place is what is sampled from
        self, server: InferenceServer, staged: StagedWeights
    ) -> None:
        """After the proof: let environments sample from it, and forget older versions on the server."""

    def is_served(self, server: InferenceServer, staged: StagedWeights) -> bool:
        """Tell whether the server still shows this version: False after it was restarted. Cheap.

        A server without labels cannot tell, and counts as unchanged.
        """
        label = server.weight_version()
        return label is None or label == str(staged.version)

    def prune(self, served: int) -> None:  # noqa: B027 - most keep nothing
        """Delete old versions, but never the one that is served; called after a publish that succeeded."""

    def close(self, servers: Sequence[InferenceServer]) -> None:  # noqa: B027 - most hold nothing
        """Give back process groups and the like; servers that do not answer are no failure."""

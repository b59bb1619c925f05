"""Our publisher in verl: new weights into the servers that environments sample from, and the proof.

The proof's own side, log-probs of fixed texts, is computed by verl's engine on all its ranks, so it holds
for what verl trains, and not only for what was written. Texts are scored token by token; what needs a whole
row of logits (the next token, along the path of the prefix cache) is left out: verl's engine gives none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import verl.utils.tensordict_utils as tu

from trainer.config import TrainerConfig
from trainer.publish import (
    DiskTransport,
    InferenceServer,
    Probes,
    ProbeScores,
    Publisher,
    WeightTransport,
    make_probes,
)
from trainer.publish.interfaces import StagedWeights
from trainer.run.build import PUBLISHED_MODES, build_servers
from trainer.run.places import publish_directory
from verl_integration.batches import bare_sample, make_rows
from verl_integration.checkpoint_engine import EXPORT_NAME
from verl_integration.settings import SERVERS_BESIDE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_publisher(
    config: TrainerConfig,
    workers: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ranks: int,
    started: LoadedByVerl | None = None,
) -> Publisher | None:
    """Publish to the servers that verl started, or over a directory to those of `publish.servers`, if any.

    Args:
        config: Ours.
        workers: Verl's group of training workers.
        tokenizer: The model's.
        ranks: Ranks of data parallelism.
        started: The servers that verl started; None: none.

    Raises:
        ConfigurationError: A probe is unusable.
    """
    settings = config.publish
    if started is not None:
        urls = [f"http://{address}" for address in started.addresses]
        settings = settings.model_copy(update={"transport": "disk", "servers": urls})
    elif settings.transport == "none":
        return None
    probes = make_probes(tokenizer, settings.probes, context=config.atropos.max_token_length)
    return Publisher(
        settings,
        transport=started or _over_directory(config, workers),
        servers=build_servers(settings),
        probes=replace(probes, passage=[], cuts=()),
        score=lambda asked: score_by_verl(workers, asked, ranks=ranks),
    )


def _over_directory(config: TrainerConfig, workers: Any) -> WeightTransport:
    directory = publish_directory(config).absolute()

    def capture() -> Callable[[Path], object]:
        # Written at once: what verl trains next changes the weights. Nothing of it waits for a server.
        ray.get(workers.update_weights(mode=SERVERS_BESIDE))
        return (directory / EXPORT_NAME).rename

    mode = PUBLISHED_MODES[config.publish.readable_by]
    return DiskTransport(directory, capture, keep=config.publish.keep, mode=mode)


class LoadedByVerl(WeightTransport):
    """For servers that verl started: verl brings the weights, the proof is ours.

    Args:
        addresses: `host:port` of each.
        update: Has verl bring the current weights into them.
    """

    overlaps = False
    pauses = False

    def __init__(self, addresses: Sequence[str], update: Callable[[], object]) -> None:
        self.addresses = addresses
        self._update = update

    def capture(self, version: int) -> Callable[[], StagedWeights]:
        """Have verl update its servers, which it pauses itself."""
        self._update()
        return lambda: StagedWeights(version=version, dtype=None)

    def load(self, server: InferenceServer, staged: StagedWeights) -> None:
        """Verl has loaded it; label it, where the server takes a label."""
        server.tag(staged.version)

    def connect(self, server: InferenceServer) -> WeightTransport:
        """Nothing to agree on."""
        return self

    def is_served(self, server: InferenceServer, staged: StagedWeights) -> bool:
        """Verl restarts its servers itself."""
        return True


def score_by_verl(workers: Any, probes: Probes, *, ranks: int) -> ProbeScores:
    """Have verl's engine score the probes with the weights as they are, at temperature 1.

    Args:
        workers: Verl's group of training workers.
        probes: Without a passage.
        ranks: Ranks of data parallelism.
    """
    rows = make_rows([bare_sample(tokens, trained=True) for tokens in probes.texts], multiple=ranks)
    del rows["temperature"]  # one for all takes verl's faster way
    for name, value in {"temperature": 1.0, "compute_loss": False, "calculate_entropy": False}.items():
        tu.assign_non_tensor_data(rows, name, value)
    output = workers.compute_log_prob(rows)
    scored = output["log_probs"].unbind()[: len(probes.texts)]  # entry t speaks of token t + 1
    return ProbeScores(texts=[row[:-1].float().tolist() for row in scored], next_tokens=())

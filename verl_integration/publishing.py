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
import torch
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
from trainer.samples.sample import Sample
from verl_integration.batches import rows_of_samples
from verl_integration.checkpoint_engine import BACKEND, EXPORT_NAME

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def publisher_to_servers_beside(
    config: TrainerConfig, workers: Any, tokenizer: PreTrainedTokenizerBase, *, ranks: int
) -> Publisher | None:
    """Publish over a directory to the servers of `publish.servers`; None with `publish.transport` none.

    Args:
        config: Ours.
        workers: Verl's group of training workers.
        tokenizer: The model's.
        ranks: Ranks of data parallelism.

    Raises:
        ConfigurationError: A probe is unusable.
    """
    settings = config.publish
    if settings.transport == "none":
        return None
    directory = publish_directory(config).absolute()

    def capture() -> Callable[[Path], object]:
        # Written at once: what verl trains next changes the weights. Nothing of it waits for a server.
        ray.get(workers.update_weights(mode=BACKEND))
        return (directory / EXPORT_NAME).rename

    transport = DiskTransport(
        directory, capture, keep=settings.keep, mode=PUBLISHED_MODES[settings.readable_by]
    )
    return _publisher(config, transport, build_servers(settings), workers, tokenizer, ranks=ranks)


class LoadedByVerl(WeightTransport):
    """For servers that verl started: verl brings the weights, the proof is ours.

    Args:
        update: Has verl bring the current weights into its servers.
    """

    overlaps = False
    pauses = False

    def __init__(self, update: Callable[[], object]) -> None:
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


def publisher_to_servers_of_verl(
    config: TrainerConfig,
    workers: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ranks: int,
    addresses: Sequence[str],
    update: Callable[[], object],
) -> Publisher:
    """Prove what verl brings into the servers that it started itself.

    Args:
        config: Ours.
        workers: Verl's group of training workers.
        tokenizer: The model's.
        ranks: Ranks of data parallelism.
        addresses: `host:port` of each server.
        update: Has verl bring the current weights into them.
    """
    urls = [f"http://{address}" for address in addresses]
    settings = config.publish.model_copy(update={"transport": "disk", "servers": urls})
    servers = build_servers(settings)
    ours = config.model_copy(update={"publish": settings})
    return _publisher(ours, LoadedByVerl(update), servers, workers, tokenizer, ranks=ranks)


def _publisher(
    config: TrainerConfig,
    transport: WeightTransport,
    servers: Sequence[InferenceServer],
    workers: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ranks: int,
) -> Publisher:
    probes = make_probes(tokenizer, config.publish.probes, context=config.atropos.max_token_length)
    return Publisher(
        config.publish,
        transport=transport,
        servers=servers,
        probes=replace(probes, passage=[], cuts=()),
        score=lambda asked: score_by_verl(workers, asked, ranks=ranks),
    )


def score_by_verl(workers: Any, probes: Probes, *, ranks: int) -> ProbeScores:
    """Have verl's engine score the probes with the weights as they are, at temperature 1.

    Args:
        workers: Verl's group of training workers.
        probes: Without a passage.
        ranks: Ranks of data parallelism.
    """
    samples = [_probe(tokens) for tokens in probes.texts]
    rows = rows_of_samples(samples, [1.0] * len(samples), multiple=ranks)
    for name, value in {"temperature": 1.0, "compute_loss": False, "calculate_entropy": False}.items():
        if name in rows.keys():  # noqa: SIM118 - a TensorDict
            del rows[name]
        tu.assign_non_tensor_data(rows, name, value)
    output = workers.compute_log_prob(rows)
    scored = output["log_probs"].unbind()[: len(samples)]  # entry t speaks of token t + 1
    return ProbeScores(texts=[row[:-1].float().tolist() for row in scored], next_tokens=())


def _probe(tokens: Sequence[int]) -> Sample:
    trained = torch.ones(len(tokens))
    trained[0] = 0.0
    return Sample(
        tokens=torch.tensor(tokens),
        loss_mask=trained,
        advantages=torch.zeros(len(tokens)),
        inference_logprobs=None,
        ref_logprobs=None,
        temperature=1.0,
        score=0.0,
        env_id=None,
        group_index=0,
    )

"""New weights into the servers that environments sample from, and the proof that they serve them.

Where verl starts no servers, a checkpoint engine writes the weights as a directory: every rank goes through a
generator of whole weights, because exporting is a collective, and rank 0 writes. Our publisher, beside verl's
trainer, has the servers load it. The proof's own side, log-probs of fixed texts, is computed by verl's engine
on all its ranks, so it holds for what verl trains; that gives no rows of logits, to ask for the next token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import ray
import torch
import verl.utils.tensordict_utils as tu
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from verl.checkpoint_engine import CheckpointEngineRegistry, ColocatedCheckpointEngine

from atropos_client.private_files import make_run_directory
from trainer.config import TrainerConfig
from trainer.errors import CheckpointError, ConfigurationError
from trainer.export.hf_model import write_model_directory
from trainer.model.base_checkpoint import read_base
from trainer.model.pretrained import load_structure
from trainer.model.weight_stream import WeightStream
from trainer.publish import DiskTransport, InferenceServer, Probes, ProbeScores, Publisher, make_probes
from trainer.publish.interfaces import StagedWeights, WeightTransport
from trainer.run.build import PUBLISHED_MODES, build_servers
from trainer.run.places import publish_directory
from verl_integration.batches import bare_sample, make_rows
from verl_integration.settings import SERVERS_BESIDE

_EXPORT: Final = "export"  # where rank 0 leaves the weights, in the directory of versions


@CheckpointEngineRegistry.register(SERVERS_BESIDE)
class DirectoryCheckpointEngine(ColocatedCheckpointEngine):
    """Writes what verl exports to `<directory>/export`, in the base's files, names, types and shards.

    The directory is that of the versions, which rank 0, verl's trainer and the servers share; `mode` are the
    permissions there, `layout` see `_read_layout`.
    """

    def __init__(
        self, bucket_size: int, is_master: bool, *, directory: str, mode: int, **layout: str
    ) -> None:
        super().__init__(bucket_size, is_master)
        self._directory, self._mode, self._layout = Path(directory), mode, layout

    async def send_weights(
        self, weights: Iterable[tuple[str, Tensor]], global_steps: int | None = None
    ) -> dict[str, Any]:
        """Write the weights; on other ranks: send this rank's part.

        Raises:
            CheckpointError: The file system refused, or verl exports other weights than the base has.
        """
        exported = iter(weights)
        try:
            if self.is_master:
                make_run_directory(self._directory, mode=self._mode)
                layout = _read_layout(**self._layout)
                path, named = self._directory / _EXPORT, _in_layout(exported, layout)
                write_model_directory(path, layout, named, replace=True, durable=False, mode=self._mode)
        finally:
            for _ in exported:  # the other ranks wait for this one
                pass
        return {}


@cache
def _read_layout(model_path: str, dtype: str) -> WeightStream:
    """Names, types and shapes of the base, by a model without weights; `dtype` as of `publish.dtype`."""
    structure = load_structure(model_path, trust_remote_code=False)
    if structure is None:
        raise ConfigurationError(
            f"actor_rollout_ref.model.path {model_path!r} must be a directory of unquantized safetensors, to "
            "publish in its layout"
        )
    base = read_base(model_path)
    if dtype == "auto":
        return WeightStream(structure, base)
    kind: torch.dtype = getattr(torch, dtype)
    return WeightStream(structure, base.declaring(kind), dtype=kind)


def _in_layout(exported: Iterable[tuple[str, Tensor]], layout: WeightStream) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight that the base has, once, in its type; verl exports a tied one under every name."""
    wanted = {entry.name: entry for entry in layout.entries()}
    for name, tensor in exported:
        entry = wanted.pop(name, None)
        if entry is None:
            continue
        if tuple(tensor.shape) != entry.shape:
            raise CheckpointError(
                f"verl exports {name} as {list(tensor.shape)}, the base has {list(entry.shape)}"
            )
        yield name, tensor.detach().to(entry.dtype).contiguous()
    if wanted:
        raise CheckpointError(f"verl does not export {', '.join(sorted(wanted)[:5])}, which the base has")


class LoadedByVerl(WeightTransport):
    """For servers that verl started, at `host:port` each: verl brings the weights by `update`, and pauses."""

    overlaps = False
    pauses = False

    def __init__(self, addresses: Sequence[str], update: Callable[[int], object]) -> None:
        self.urls = [f"http://{address}" for address in addresses]
        self._update = update

    def capture(self, version: int) -> Callable[[], StagedWeights]:
        """Have verl update its servers."""
        self._update(version)
        return lambda: StagedWeights(version=version, dtype=None)

    def load(self, server: InferenceServer, staged: StagedWeights) -> None:
        """Label what verl has loaded, where the server takes a label."""
        server.tag(staged.version)


def make_publisher(
    config: TrainerConfig,
    workers: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ranks: int,
    started: LoadedByVerl | None = None,
) -> Publisher | None:
    """Publish to servers that verl `started`, or over a directory to those of `publish.servers`, if any.

    `workers` is verl's group of training workers, of so many `ranks` of data parallelism. An unusable probe
    raises a ConfigurationError.
    """
    settings, directory = config.publish, publish_directory(config).absolute()
    if started is not None:
        settings = settings.model_copy(update={"transport": "disk", "servers": started.urls})
    if settings.transport == "none":
        return None

    def capture() -> Callable[[Path], object]:
        # Written at once: what verl trains next changes the weights. Nothing of it waits for a server.
        ray.get(workers.update_weights(mode=SERVERS_BESIDE))
        return (directory / _EXPORT).rename

    mode = PUBLISHED_MODES[settings.readable_by]
    probes = make_probes(tokenizer, settings.probes, context=config.atropos.max_token_length)
    return Publisher(
        settings,
        transport=started or DiskTransport(directory, capture, keep=settings.keep, mode=mode),
        servers=build_servers(settings),
        probes=replace(probes, passage=[], cuts=()),
        score=lambda asked: score_by_verl(workers, asked, ranks=ranks),
    )


def score_by_verl(workers: Any, probes: Probes, *, ranks: int) -> ProbeScores:
    """Have verl's engine score the probes' texts with the weights as they are, at temperature 1."""
    rows = make_rows([bare_sample(tokens, trained=True) for tokens in probes.texts], multiple=ranks)
    tu.assign_non_tensor(rows, temperature=1.0, compute_loss=False)
    output = workers.compute_log_prob(rows)
    scored = output["log_probs"].unbind()[: len(probes.texts)]  # entry t speaks of token t + 1
    return ProbeScores(texts=[row[:-1].float().tolist() for row in scored], next_tokens=())

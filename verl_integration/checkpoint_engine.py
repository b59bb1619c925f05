"""A checkpoint engine of verl's that writes the weights as a directory, for our publisher to take over.

Every rank of training calls it with a generator of whole weights, and all have to go through it: exporting is
a collective. Rank 0 writes: the base's files, names, types and shards, with the new numbers, in safetensors.
The publisher, in the process of verl's trainer, gives the directory its version, has the servers load it, and
proves it (`verl_integration.publishing`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from verl.checkpoint_engine import CheckpointEngineRegistry, ColocatedCheckpointEngine

from atropos_client.private_files import make_run_directory
from trainer.errors import CheckpointError, ConfigurationError
from trainer.export.hf_model import write_model_directory
from trainer.model.base_checkpoint import read_base
from trainer.model.pretrained import load_structure
from trainer.model.weight_stream import WeightStream
from verl_integration.settings import SERVERS_BESIDE

EXPORT_NAME: Final = "export"
"""Where rank 0 leaves the weights, in the directory of versions."""


@CheckpointEngineRegistry.register(SERVERS_BESIDE)
class DirectoryCheckpointEngine(ColocatedCheckpointEngine):
    """Writes what verl exports to `<directory>/export`; nobody is connected, and nothing receives.

    Args:
        bucket_size: Of verl; not needed.
        is_master: Whether this is rank 0.
        directory: Of the versions, on a file system that rank 0, verl's trainer and the servers share.
        model_path: Directory of the base; the weights are written in its layout.
        dtype: See `publish.dtype`.
        mode: Permissions of what is written.
    """

    def __init__(
        self, bucket_size: int, is_master: bool, *, directory: str, model_path: str, dtype: str, mode: int
    ) -> None:
        super().__init__(bucket_size, is_master)
        self._directory = Path(directory)
        self._model_path = model_path
        self._dtype: torch.dtype | None = None if dtype == "auto" else getattr(torch, dtype)
        self._mode = mode
        self._stream: WeightStream | None = None

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
                stream = self._stream = self._stream or _layout_of(self._model_path, self._dtype)
                path, renamed = self._directory / EXPORT_NAME, _in_layout(exported, stream)
                write_model_directory(path, stream, renamed, replace=True, durable=False, mode=self._mode)
        finally:
            for _ in exported:  # the other ranks wait for this one
                pass
        return {}


def _layout_of(model_path: str, dtype: torch.dtype | None) -> WeightStream:
    """Names, types and shapes that the base has, by a model without weights."""
    structure = load_structure(model_path, trust_remote_code=False)
    if structure is None:
        raise ConfigurationError(
            f"actor_rollout_ref.model.path {model_path!r} must be a directory of unquantized safetensors, to "
            "publish in its layout"
        )
    base = read_base(model_path)
    return WeightStream(structure, base if dtype is None else base.declaring(dtype), dtype=dtype)


def _in_layout(exported: Iterable[tuple[str, Tensor]], stream: WeightStream) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight that the base has, once, in its type; verl exports a tied one under every name.

    Raises:
        CheckpointError: One is missing at the end, or has another shape.
    """
    wanted = {entry.name: entry for entry in stream.entries()}
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

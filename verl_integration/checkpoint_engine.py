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
from verl.checkpoint_engine import CheckpointEngine, CheckpointEngineRegistry

from atropos_client.private_files import make_run_directory
from trainer.errors import CheckpointError, ConfigurationError
from trainer.export.hf_model import write_model_directory
from trainer.model.base_checkpoint import read_base
from trainer.model.pretrained import load_structure
from trainer.model.weight_stream import WeightStream

BACKEND: Final = "atropos"
EXPORT_NAME: Final = "export"
"""Where rank 0 leaves the weights, in the directory of versions."""


@CheckpointEngineRegistry.register(BACKEND)
class DirectoryCheckpointEngine(CheckpointEngine):
    """Writes what verl exports to `<directory>/export`.

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
        del bucket_size
        self._is_master = is_master
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
        del global_steps  # the publisher names the version
        exported = iter(weights)
        try:
            if self._is_master:
                self._write(exported)
        finally:
            for _ in exported:  # the other ranks wait for this one
                pass
        return {}

    def _write(self, exported: Iterator[tuple[str, Tensor]]) -> None:
        make_run_directory(self._directory, mode=self._mode)
        stream = self._stream = self._stream or _layout_of(self._model_path, self._dtype)
        path = self._directory / EXPORT_NAME
        weights = _in_layout(exported, stream)
        write_model_directory(path, stream, weights, replace=True, durable=False, mode=self._mode)

    async def receive_weights(self, global_steps: int | None = None) -> Any:
        """Nothing receives here: servers read the directory.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            "the checkpoint engine atropos is for servers beside verl, which load a directory; for those "
            "that verl starts itself (rollout.nnodes above 0) use one of verl's own, e.g. nccl"
        )

    def prepare(self) -> dict[str, Any]:
        """Nothing to prepare."""
        return {}

    def init_process_group(self, **kwargs: Any) -> None:
        """There is none."""

    def finalize(self) -> None:
        """Nothing to give back."""

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Return no topology: nobody is connected."""
        return {}, {}


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

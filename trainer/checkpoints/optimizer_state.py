"""AdamW's state on the disk: safetensors, one tensor a name `<parameter>/<moment>`.

A moment of 8 bits is three tensors, `<parameter>/<moment>.codes`, `.scale` and `.map`; a run whose moments
are of the other kind reads it, too. Small states are one file, `optimizer.safetensors`; larger ones several.
Which tensor lies in which file depends on their sizes alone, so that any number of processes writes the same
bytes, and any other reads them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from atropos_client.readable import require_readable
from trainer.checkpoints.manifest import Manifest
from trainer.errors import CheckpointError
from trainer.export.tensor_file import TensorFile, write_tensors
from trainer.model.base_checkpoint import StoredTensor
from trainer.model.sharding import Spread, in_turn

FILE_BYTES: Final = 4 << 30
"""Most bytes of a file, but for one that holds a single larger tensor; one process writes each."""

_STEM: Final = "optimizer"

_PARTS: Final = ("codes", "scale", "map")
"""What a moment of 8 bits consists of: a code for each number, a scale for each block, the codes' values."""


def write_optimizer(
    directory: Path,
    optimizer: torch.optim.Optimizer,
    names: list[str],
    spread: Spread,
    *,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write an optimizer's state; where it is spread over processes, all of them call it.

    Args:
        directory: The same on every process.
        optimizer: AdamW, or what wraps it.
        names: Of its parameters, in its order; they cannot hold a slash.
        spread: How the state is spread.
        file_bytes: See `FILE_BYTES`.

    Raises:
        OSError: The file system refused.
    """
    tensors = {
        f"{names[index]}/{moment}": value
        for index, moments in optimizer.state_dict()["state"].items()
        for moment, value in sorted(_tensors(moments, spread).items())
    }
    files = _divide(
        {name: StoredTensor(each.dtype, tuple(each.shape)) for name, each in tensors.items()}, file_bytes
    )
    owners = spread.owners(
        {file: sum(each.nbytes for each in content.values()) for file, content in files.items()},
        last_first=True,  # the first ones write the model
    )
    places: dict[str, TensorFile] = {}
    with ExitStack() as stack:
        failure: OSError | None = None
        try:
            for file, content in files.items():
                if owners[file] == spread.rank:
                    opened = stack.enter_context(TensorFile(directory / file, content))
                    places |= dict.fromkeys(content, opened)
        except OSError as error:
            failure = error
        of_tensors = {name: owners[file] for file, content in files.items() for name in content}
        write_tensors(places, _whole(tensors, of_tensors, spread), failure, flush=spread.sharded)


def read_optimizer(
    directory: Path,
    manifest: Manifest,
    parameters: Mapping[str, Tensor],
    spread: Spread,
    in_8_bit: Callable[[Tensor], bool] = lambda parameter: False,
) -> dict[str, dict[str, Tensor]]:
    """Read the state of each parameter; of a spread one only what this process holds.

    Args:
        directory: The checkpoint.
        manifest: Of it: which files there are.
        parameters: By name.
        spread: How they are spread.
        in_8_bit: Whether the moments of a parameter are to be in 8 bits, whatever they are in the file.

    Raises:
        CheckpointError: A file is damaged, missing, or may not be read.
        KeyError: There is a state of an unknown parameter.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for path in (directory / name for name in manifest.files if _is_optimizer(name)):
        try:
            require_readable(path)  # safetensors says of a file that may not be read that there is none
            with safe_open(path, framework="pt") as file:
                stored = set(file.keys())
                for name in dict.fromkeys(_moment(each) for each in file.keys()):  # noqa: SIM118 - no mapping
                    parameter, _, moment = name.rpartition("/")
                    of = parameters[parameter]
                    state.setdefault(parameter, {})[moment] = (
                        file.get_tensor(name)
                        if moment == "step"
                        else _own(file, name, of, spread, was_8_bit=name not in stored, in_8_bit=in_8_bit(of))
                    )
        except PermissionError as error:
            raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is damaged or missing: {error}") from error
    return state


def _own(
    file: Any, name: str, parameter: Tensor, spread: Spread, *, was_8_bit: bool, in_8_bit: bool
) -> Tensor:
    """Read own rows of a moment."""
    first, past = spread.own_rows(parameter)
    signed = name.endswith("/exp_avg")
    if was_8_bit and in_8_bit:
        from trainer.model.small_adamw import put_together, rows_of_blocks

        each = rows_of_blocks(parameter)
        return put_together(
            {
                "codes": file.get_slice(f"{name}.codes")[first:past],
                "scale": file.get_slice(f"{name}.scale")[first // each : past // each],
                "map": file.get_tensor(f"{name}.map"),
            },
            parameter,
            spread,
            signed=signed,
        )
    if was_8_bit:
        codes, scale, values = (file.get_tensor(f"{name}.{part}") for part in _PARTS)
        numbers = values[codes.int()].view(scale.numel(), -1) * scale.reshape(-1, 1)
        return spread.as_part(numbers.view(codes.shape)[first:past], parameter)
    own: Tensor = file.get_slice(name)[first:past]
    if in_8_bit:
        from trainer.model.small_adamw import rounded

        return rounded(own, parameter, spread, signed=signed)
    return spread.as_part(own, parameter)


def _tensors(moments: Mapping[str, Tensor], spread: Spread) -> dict[str, Tensor]:
    """Return the tensors that are written of a parameter's moments."""
    written: dict[str, Tensor] = {}
    for moment, value in moments.items():
        own: Any = value.detach()
        own = own.to_local() if isinstance(own, DTensor) else own
        if hasattr(own, "codes"):
            from trainer.model.small_adamw import take_apart

            written |= {f"{moment}.{part}": each for part, each in take_apart(value, spread).items()}
        else:
            written[moment] = value.detach()
    return written


def _moment(name: str) -> str:
    """Return a tensor's name without the part that it is of a moment of 8 bits."""
    parameter, _, moment = name.rpartition("/")
    return f"{parameter}/{moment.partition('.')[0]}"


def _is_optimizer(name: str) -> bool:
    return "/" not in name and name.startswith(_STEM) and name.endswith(".safetensors")


def _divide(tensors: Mapping[str, StoredTensor], most: int) -> dict[str, dict[str, StoredTensor]]:
    """Put tensors, in their order, into files of at most so many bytes; a moment's parts into one."""
    sizes: Counter[str] = Counter()
    for name, tensor in tensors.items():
        sizes[_moment(name)] += tensor.nbytes
    parts: list[dict[str, StoredTensor]] = [{}]
    size, last = 0, ""
    for name, tensor in tensors.items():
        if _moment(name) != last and parts[-1] and size + sizes[_moment(name)] > most:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
        last = _moment(name)
    names = [f"{_STEM}.safetensors"]
    if len(parts) > 1:
        names = [
            f"{_STEM}-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)
        ]
    return dict(zip(names, parts, strict=True))


def _whole(
    tensors: Mapping[str, Tensor], owners: Mapping[str, int], spread: Spread
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that this process writes, whole, one at a time; owners in turn."""
    for name, owner in in_turn((name, owners[name]) for name in tensors):
        whole = spread.whole_on(tensors[name], owner)
        if whole is not None:
            yield name, whole
        del whole  # before the next one is made

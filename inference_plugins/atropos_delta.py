"""Takes the trainer's deltas into vLLM's workers, and tells what the model then really holds.

    ATROPOS_DELTA_SOURCE=/run/published PYTHONPATH=inference_plugins \
        vllm serve MODEL --worker-extension-cls atropos_delta.AtroposDelta

Called over `/collective_rpc`, in this order: `atropos_delta_prepare` reads and checks a file in a thread,
while the old weights are served; `atropos_delta_state` tells when it is done; `atropos_delta_apply` writes.

Where a number of a checkpoint lies in the model (packed with others, cut up for tensor parallelism) is learnt
from the model's own loader: it is given tensors without data, and what it would copy where is noted instead.
Each number is read back after it was written. With the same notes all that the model holds of a checkpoint is
summed up in the checkpoint's own order, so the workers' sums can be added and compared with the trainer's.

`ATROPOS_DELTA_SOURCE` is the published directory, or the trainer's http(s) URL; then `ATROPOS_DELTA_TOKEN`
has the token. Callers name a file in it, and nothing outside can be read. A worker that failed while it wrote
takes nothing but a full version from then on.

On the CPU vLLM computes with packed copies of the weights and gives the weights away. They are kept here, and
packed anew after they were written: beside what serves it would take a second copy of both, and longer than
generation has to stand still for it. There places and sums are computed by numpy, in one thread, beside which
the server goes on; it stands still for the writing and packing, which a few threads do.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

FORMAT = "atropos-delta/2"
SOURCE, TOKEN = "ATROPOS_DELTA_SOURCE", "ATROPOS_DELTA_TOKEN"

_FILE_NAME = re.compile(r"v\d{6,}\.(delta|whole)\.safetensors")
_FETCH_SECONDS = 60.0  # without a byte
_PIECE = 1 << 20
_NUMBERS = 1 << 15  # hashed at once
_WRITERS = 4  # threads at most: each of them packs with as many of its own as torch has
_OTHER_WRITERS = ("reload_weights", "reset_weights", "start_weight_update", "update_weights")
"""Methods of vLLM's workers that change weights."""
_LOOK_SECONDS = 1e-4  # between two looks for work, while a file is checked
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class AtroposDelta:
    """Methods that every worker has besides its own; vLLM adds them to its class."""

    def atropos_delta_state(self) -> dict[str, Any]:
        """Tell the version and checksum held, and how far the file is that was asked for last."""
        return _receiver(self).state()

    def atropos_delta_prepare(self, name: str, sha256: str, size: int) -> dict[str, Any]:
        """Begin to read and check a file; nothing of the model is touched."""
        return _receiver(self).prepare(name, sha256, size)

    def atropos_delta_apply(self, name: str) -> dict[str, Any]:
        """Write the file that is ready; generation has to be paused."""
        return _receiver(self).apply(name)


def _receiver(worker: Any) -> Receiver:
    if "_atropos_receiver" not in vars(worker):
        receiver = worker._atropos_receiver = Receiver(worker.get_model(), own_checkpoint(worker))
        for name in _OTHER_WRITERS:
            if (write := getattr(worker, name, None)) is not None:
                setattr(worker, name, _forgetting(receiver, write))
    made: Receiver = worker._atropos_receiver
    return made


def _forgetting(receiver: Receiver, write: Callable[..., Any]) -> Callable[..., Any]:
    def forget_and_write(*args: Any, **kwargs: Any) -> Any:
        receiver.forget()
        return write(*args, **kwargs)

    return forget_and_write


@dataclass(frozen=True)
class OwnCheckpoint:
    """The checkpoint that vLLM itself has loaded last."""

    path: Callable[[], str]
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]


def own_checkpoint(worker: Any) -> OwnCheckpoint:
    """Return what the worker was started with, or has reloaded since."""
    config = worker.vllm_config

    def tensors() -> Iterator[tuple[str, Tensor]]:
        from vllm.model_executor.model_loader import get_model_loader  # type: ignore[import-not-found]

        if getattr(config.model_config, "use_mla", False):
            raise UnfitError("its attention keeps numbers that are computed from weights")
        loader: Any = get_model_loader(config.load_config)
        yield from loader.get_all_weights(config.model_config, worker.get_model())

    return OwnCheckpoint(lambda: str(config.model_config.model), tensors)


class RefusedError(Exception):
    """A file does not fit, or cannot be had; nothing was touched."""


class UnfitError(RefusedError):
    """A server's weights are laid out in another way than a checkpoint's: no file fits, now or later."""


@dataclass(frozen=True)
class Piece:
    """A part of a checkpoint's tensor, and where the model has it."""

    held: Tensor
    """The model's own numbers: a view."""
    offset: int
    strides: tuple[int, ...]
    """Where it lies in the checkpoint's flat tensor: of the same shape as `held`."""

    def of(self, flat: Tensor) -> Tensor:
        """The same part of another tensor in the checkpoint's layout."""
        return flat.as_strided(self.held.shape, self.strides, self.offset)

    def locate(self, indices: Tensor) -> tuple[Tensor | slice, Tensor]:
        """Find which ascending indices of a checkpoint are in this part, and where in the model's storage."""
        if self.held.is_contiguous() and self.strides == self.held.stride():  # whole rows, as they are
            ends = torch.tensor([self.offset, self.offset + self.held.numel()], device=indices.device)
            run = slice(*torch.searchsorted(indices, ends).tolist())
            shift = int(self.held.storage_offset()) - self.offset
            return run, indices[run] + shift if shift else indices[run]
        left, inside = indices - self.offset, indices >= self.offset
        places = torch.full_like(indices, int(self.held.storage_offset()))
        shape, steps = self.held.shape, self.held.stride()
        for size, stride, step in sorted(
            zip(shape, self.strides, steps, strict=True), key=lambda each: -each[1]
        ):
            if size == 1:
                continue
            digit = left.div(stride, rounding_mode="floor")
            inside &= digit < size
            left = left - digit * stride
            places += digit * step
        inside &= left == 0
        return inside, places[inside]

    def sum(self, flat: Tensor | None = None) -> int:
        """Sum up the part as the trainer does: of the model, or of a checkpoint's flat tensor."""
        source = bits(self.held if flat is None else self.of(flat))
        rows, strides = (source, self.strides) if source.dim() else (source.reshape(1), (0,))
        inner = torch.zeros(rows.shape[1:], dtype=torch.int64, device=rows.device)
        for place, (size, stride) in enumerate(zip(rows.shape[1:], strides[1:], strict=True)):
            steps = torch.arange(size, device=rows.device) * stride
            inner += steps.view([-1 if each == place else 1 for each in range(inner.dim())])
        total, step = 0, max(1, _NUMBERS // max(1, inner.numel()))
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            numbers = torch.arange(first, first + len(part), device=rows.device) * strides[0] + self.offset
            indices = numbers.view(-1, *[1] * inner.dim()) + inner
            total += element_sum(indices.reshape(-1), part.reshape(-1))
        return wrapped(total)


class _Notes(TorchFunctionMode):
    """Notes what a loader would copy, and copies nothing. In this thread only."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names
        self.pieces: dict[str, list[Piece]] = {name: [] for name in names.values()}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.Tensor.copy_:
            return function(*args, **(kwargs or {}))
        held, source = args[0], args[1]
        name = self._names.get(source.untyped_storage()._cdata)
        if name is None:
            raise UnfitError("the model's loader computes weights instead of copying them")
        if held.shape != source.shape:
            raise UnfitError(
                f"{name}: the server holds {list(held.shape)}, the checkpoint has {list(source.shape)}"
            )
        if source.numel():
            self.pieces[name].append(Piece(held.detach(), source.storage_offset(), source.stride()))
        return held


def note_pieces(
    model: Any, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> dict[str, list[Piece]]:
    """Ask a model's loader where it puts a checkpoint's tensors.

    Args:
        model: vLLM's; it has `load_weights`.
        tensors: Shapes and types by name.

    Raises:
        RefusedError: It does more than copy.
    """
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in tensors.items()}
    notes = _Notes({tensor.untyped_storage()._cdata: name for name, tensor in empty.items()})
    try:
        with torch.no_grad(), notes:
            model.load_weights(iter(empty.items()))
    except RefusedError:
        raise
    except Exception as error:
        raise UnfitError(f"the model's loader takes no tensors without data: {error!r}") from error
    return notes.pieces


@dataclass
class _Change:
    """What will be written into one piece."""

    piece: Piece
    values: Tensor
    """Bits."""
    places: Tensor | None
    """Where in the piece's storage. None: all of the piece."""

    def write_into(self, storage: Tensor) -> bool:
        """Write into the bits of the piece's storage, or a copy; return whether they read the same."""
        if self.places is not None:
            put(storage, self.places, self.values)
            return torch.equal(take(storage, self.places), self.values)
        held = self.piece.held
        part = storage.as_strided(held.shape, held.stride(), held.storage_offset())
        part.copy_(self.values)
        return torch.equal(part, self.values.to(part.device))


@contextmanager
def _looking_less_often() -> Iterator[None]:
    """Let vLLM look for work every tenth of a millisecond, while a file is checked.

    For a second after a request the main thread of its worker looks without a rest, and a thread that has
    computed something waits each time for the interpreter: checking took twice as long.
    """
    try:
        from vllm.distributed.device_communicators import shm_broadcast  # type: ignore[import-not-found]

        look_again = shm_broadcast.sched_yield
    except (ImportError, AttributeError):  # this vLLM waits in another way
        yield
        return
    shm_broadcast.sched_yield = lambda: time.sleep(_LOOK_SECONDS)
    try:
        yield
    finally:
        shm_broadcast.sched_yield = look_again


@dataclass
class _Ready:
    """A file that is checked, and what it will do."""

    name: str
    version: int
    checksum: str
    sums: dict[str, tuple[int, int]]
    """What the model will then hold: sum and count of numbers by the checkpoint's names."""
    changes: list[_Change]


class Receiver:
    """Holds what one worker knows of its version.

    Args:
        model: vLLM's model.
        own: What vLLM itself loaded into it.
    """

    def __init__(self, model: Any, own: OwnCheckpoint) -> None:
        self._model = model
        self._own = own
        self._loaded_from = ""  # what `own` said when the layout was checked; another: somebody has reloaded
        self._pieces: dict[str, list[Piece]] = {}
        self._sums: dict[str, tuple[int, int]] = {}
        self._version: int | None = None
        self._checksum: str | None = None
        self._ready: _Ready | None = None
        self._error: str | None = None
        self._unfit = False
        self._asked = ""
        self._forgotten = 0  # how often somebody else has written
        self._thread: threading.Thread | None = None

    def state(self) -> dict[str, Any]:
        """See `AtroposDelta.atropos_delta_state`."""
        if self._own.path() != self._loaded_from:
            self._version = self._checksum = None
        ready = self._ready
        return {
            "version": self._version,
            "checksum": self._checksum,
            "asked": self._asked,
            "error": self._error,
            "unfit": self._unfit,
            "ready": None if ready is None else ready.name,
            "sums": None if ready is None else {name: list(each) for name, each in ready.sums.items()},
        }

    def forget(self) -> None:
        """Hold no version any more: somebody else is about to write weights."""
        self._forgotten += 1
        self._ready = self._version = self._checksum = None
        self._pieces, self._sums = {}, {}

    def prepare(self, name: str, sha256: str, size: int) -> dict[str, Any]:
        """See `AtroposDelta.atropos_delta_prepare`."""
        if self._thread is not None and self._thread.is_alive():  # waiting would stop the engine
            return {"error": f"{self._asked} is still being read"}
        self._ready, self._error, self._unfit, self._asked = None, None, False, name
        forgotten = self._forgotten

        def run() -> None:
            try:
                with torch.no_grad(), _looking_less_often():
                    ready = self._check(name, sha256, size)
                if self._forgotten != forgotten:
                    raise RefusedError("somebody else loaded weights meanwhile")  # noqa: TRY301
                self._ready = ready
            except (RefusedError, OSError) as error:
                self._error, self._unfit = str(error), isinstance(error, UnfitError)
            except Exception as error:  # noqa: BLE001 - told to whoever asked; the server goes on serving
                self._error = repr(error)

        self._thread = threading.Thread(target=run, name="atropos-delta", daemon=True)
        self._thread.start()
        return {"error": None}

    def apply(self, name: str) -> dict[str, Any]:
        """See `AtroposDelta.atropos_delta_apply`."""
        ready, self._ready = self._ready, None
        if ready is None or ready.name != name:
            return {"error": f"{name} is not ready, or not any more; ask for it first"}
        self._version = self._checksum = None  # until all of it is written
        try:
            count = min(_WRITERS, torch.get_num_threads())
            with torch.no_grad(), ThreadPoolExecutor(count, thread_name_prefix="atropos-apply") as threads:
                on_cpu = all(change.piece.held.device.type == "cpu" for change in ready.changes)
                do: Callable[..., Iterator[Any]] = threads.map if on_cpu else map
                for _ in do(_write, *by_storage(self._model, ready.changes)):
                    pass
        except Exception as error:  # noqa: BLE001 - told to whoever asked, who brings a full version
            return {"error": f"failed half-way, and needs a full version: {error!r}"}
        self._sums |= ready.sums
        self._version, self._checksum = ready.version, ready.checksum
        return {"error": None, "version": self._version, "checksum": self._checksum}

    def _check(self, name: str, sha256: str, size: int) -> _Ready:
        self._check_layout()
        with open_source(name, sha256, size) as file:
            told, stored = read_file(file)  # mapped into memory, and read when it is used
        whole = name.endswith(".whole.safetensors")
        held = (self._version, self._checksum)
        if not whole and held != (told.base_version, told.base_checksum):
            raise RefusedError(
                f"{name} changes version {told.base_version} ({told.base_checksum[:12]}), and the server "
                f"holds {held[0]} ({str(held[1])[:12]})"
            )
        new = {
            each: (told.shapes[each], stored[each].values.dtype)
            for each in told.shapes
            if each not in self._pieces
        }
        self._pieces |= note_pieces(self._model, new)
        sums: dict[str, tuple[int, int]] = {} if whole else dict(self._sums)
        changes: list[_Change] = []
        for each, shape in told.shapes.items():
            for piece in self._pieces[each]:
                if piece.held.dtype != stored[each].values.dtype:
                    raise UnfitError(
                        f"{each} is {stored[each].values.dtype} in {name}, and the server holds "
                        f"{piece.held.dtype}: publish in the type that the server computes in"
                    )
            sums[each] = _plan(self._pieces[each], stored[each], shape, sums.get(each, (0, 0)), changes)
        return _Ready(name, told.version, told.checksum, sums, changes)

    def _check_layout(self) -> None:
        """See once that the notes are true: by them the model holds what vLLM itself has loaded, and no more.

        Raises:
            RefusedError: It does not: its layout is another one (quantized, shuffled for a kernel).
        """
        path = self._own.path()
        if path == self._loaded_from:
            return
        if Path(path).is_absolute() and not Path(path).exists():
            raise RefusedError(
                f"the checkpoint {path}, which it loaded last, is gone, and cannot be compared"
            )
        self._version = self._checksum = None
        filled: set[int] = set()
        for name, tensor in self._own.tensors():
            pieces = note_pieces(self._model, {name: (tuple(tensor.shape), tensor.dtype)})[name]
            flat = tensor.contiguous().reshape(-1)
            for piece in pieces:
                # A checkpoint of another type was converted when it was loaded.
                expected = piece.of(flat).to(piece.held.device, piece.held.dtype)
                if not torch.equal(bits(piece.held), bits(expected)):
                    raise UnfitError(f"{name} is not held as the checkpoint {path} has it")
                filled.add(_address(piece.held))
        for name, weight in self._model.named_parameters():
            if weight.numel() and _address(weight) not in filled:
                raise UnfitError(f"no tensor of the checkpoint {path} fills the model's {name}")
        self._loaded_from = path


@dataclass(frozen=True)
class Told:
    """What a file says of itself."""

    version: int
    checksum: str
    base_version: int
    base_checksum: str
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Stored:
    """One tensor's changes in a file; its data are read when they are used."""

    values: Tensor
    """All of the tensor; with `gaps`, the numbers that moved far [K]."""
    gaps: Tensor | None = None
    """Packed places of what changed."""
    moves: Tensor | None = None
    """By how much the bits there moved, int8 [N]; -128: far."""


def _plan(
    pieces: list[Piece],
    stored: Stored,
    shape: tuple[int, ...],
    before: tuple[int, int],
    changes: list[_Change],
) -> tuple[int, int]:
    """Prepare what is written for one tensor; return its sum and count after it."""
    values = stored.values
    if stored.gaps is None or stored.moves is None:
        flat = values.reshape(-1)
        for piece in pieces:
            changes.append(_Change(piece, bits(piece.of(flat)), None))
        return wrapped(sum(piece.sum(flat) for piece in pieces)), sum(piece.held.numel() for piece in pieces)
    indices = indices_from_gaps(stored.gaps)
    moves, far = stored.moves.numpy(), bits(values).numpy()
    near = moves != -128
    counts = len(moves), int(np.count_nonzero(near)) + len(far)
    numel = torch.Size(shape).numel()
    if {len(indices)} != {*counts} or (len(indices) and int(indices[-1]) >= numel):
        raise RefusedError(
            f"{counts} moves and values at {len(indices)} places up to {indices[-1:].tolist()} of {numel}"
        )
    added = moves.astype(far.dtype)
    added[~near] = far
    whole = indices, torch.from_numpy(added), torch.from_numpy(near)
    moved = 0
    for piece in pieces:
        inside, places = piece.locate(indices)
        places, numbers, change, is_near = (
            each.to(piece.held.device) for each in (places, *(each[inside] for each in whole))
        )
        old = take(_storage(piece.held), places)
        new = add(old, change, is_near)
        moved += element_sum(numbers, new) - element_sum(numbers, old)
        changes.append(_Change(piece, new, places))
    return wrapped(before[0] + moved), before[1]


def read_file(file: IO[bytes]) -> tuple[Told, dict[str, Stored]]:
    """Read a file's header; tensors are read when they are asked for.

    Raises:
        RefusedError: It is no delta, or of another format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        opened: Any = safe_open(f"/proc/self/fd/{file.fileno()}", framework="pt")
        metadata = opened.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise RefusedError(f"its format is {metadata.get('format')!r}, and {FORMAT} is read here")
        shapes = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
        told = Told(
            int(metadata["version"]),
            metadata["checksum"],
            int(metadata["base_version"]),
            metadata["base_checksum"],
            shapes,
        )
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
        packed = {
            name: [tensors[f"{name}:{part}"] for part in ("values", "gaps", "moves")]
            for name in shapes
            if f"{name}:gaps" in tensors
        }
        stored = {name: Stored(*packed.get(name) or [tensors[name]]) for name in shapes}
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise RefusedError(f"it is no delta: {error!r}") from error
    return told, stored


def indices_from_gaps(gaps: Tensor) -> Tensor:
    """Return ascending indices from the numbers of unchanged places before each.

    The largest number that the type holds stands for as many unchanged places and no changed one.
    """
    narrow = gaps.numpy() if gaps.dtype is torch.uint8 else gaps.view(torch.uint16).numpy()
    ends = narrow != np.iinfo(narrow.dtype).max
    places = np.cumsum(narrow + ends, dtype=np.int64) - 1
    return torch.from_numpy(places if ends.all() else places[ends])


def take(numbers: Tensor, indices: Tensor) -> Tensor:
    """Return the bits [N] at these places of a flat tensor of bits."""
    if numbers.device.type != "cpu":
        return numbers[indices]
    return torch.from_numpy(numbers.numpy()[indices.numpy()])


def put(numbers: Tensor, indices: Tensor, values: Tensor) -> None:
    """Write bits [N] at these places of a flat tensor of bits."""
    if numbers.device.type != "cpu":
        numbers[indices] = values
    else:
        numbers.numpy()[indices.numpy()] = values.numpy()


def add(old: Tensor, change: Tensor, is_near: Tensor) -> Tensor:
    """Return the bits [N] after a change, which is added to those that moved near and replaces the others."""
    if old.device.type != "cpu":
        return change + old * is_near
    return torch.from_numpy(change.numpy() + old.numpy() * is_near.numpy())


def element_sum(indices: Tensor, numbers: Tensor) -> int:
    """Sum a hash of each number's place and bits, modulo 2^64: the order and the division do not matter.

    Not cryptographic. `indices`: int64 [N]; `numbers`: bits as integers [N].
    """
    if indices.device.type != "cpu":
        return _mixed_sum(indices, numbers)
    places, values = indices.numpy(), numbers.numpy()
    pieces = range(0, len(places), _NUMBERS)
    return wrapped(sum(_mixed_sum(places[at : at + _NUMBERS], values[at : at + _NUMBERS]) for at in pieces))


def _mixed_sum(places: Any, values: Any) -> int:
    mixed = places * -7046029254386353131
    mixed += values
    mixed ^= mixed >> 32
    mixed *= -4658895280553007687
    mixed ^= mixed >> 29
    return wrapped(int(mixed.sum()))


def wrapped(number: int) -> int:
    """Return a number modulo 2^64, between -2^63 and 2^63."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def bits(tensor: Tensor) -> Tensor:
    """View numbers as integers of their size: NaN and the sign of zero are compared too."""
    return tensor.view(_BITS[tensor.dtype.itemsize])


def _storage(held: Tensor) -> Tensor:
    """View all of the storage that a tensor lies in, as bits."""
    size = held.untyped_storage().nbytes() // held.dtype.itemsize
    return bits(held.as_strided((size,), (1,), 0))


def _address(held: Tensor) -> int:
    return held.untyped_storage().data_ptr()


def open_source(name: str, sha256: str, size: int) -> IO[bytes]:
    """Open a published file and see that it is the one that is meant.

    Raises:
        RefusedError: It is another one, or not to be had.
    """
    if not _FILE_NAME.fullmatch(name):
        raise RefusedError(f"{name!r} is no name of a published file")
    source = os.environ.get(SOURCE)
    if not source:
        raise RefusedError(f"start the server with {SOURCE}: the published directory, or the trainer's URL")
    remote = source.startswith(("http://", "https://"))
    file = _fetch(f"{source.rstrip('/')}/{name}", size) if remote else _open(Path(source), name)
    digest, length = hashlib.sha256(), 0
    while piece := file.read(max(0, min(_PIECE, size + 1 - length))):  # one more shows that it is longer
        digest.update(piece)
        length += len(piece)
    if (digest.hexdigest(), length) != (sha256, size):
        file.close()
        raise RefusedError(
            f"{name} is damaged or another one: {length} bytes instead of {size}, or another checksum"
        )
    return file


def _open(directory: Path, name: str) -> IO[bytes]:
    return os.fdopen(os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow nothing: the token is for the trainer only."""


def _fetch(url: str, size: int) -> IO[bytes]:
    request = urllib.request.Request(url)  # noqa: S310 - the server's own setting; http or https
    token = os.environ.get(TOKEN)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    opener = urllib.request.build_opener(_NoRedirects, urllib.request.ProxyHandler({}))
    try:
        reply = opener.open(request, timeout=_FETCH_SECONDS)
    except HTTPError as error:
        error.close()
        raise RefusedError(f"{url}: HTTP {error.code}") from error
    with reply:
        file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - its user closes it
        left = size + 1  # one more shows that it is too long
        while left and (piece := reply.read(min(left, _PIECE))):
            file.write(piece)
            left -= len(piece)
    file.seek(0)
    return file


def by_storage(model: Any, changes: list[_Change]) -> tuple[list[list[_Change]], list[list[Any]]]:
    """Sort what is written by the storage that it is written into, and the layers that compute with that one.

    Layers are named on the CPU only, where they compute with a packed copy. Those that are tied share one.
    """
    written: dict[int, list[_Change]] = {}
    for change in changes:
        written.setdefault(_address(change.piece.held), []).append(change)
    packed: dict[int, list[Any]] = {address: [] for address in written}
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if hasattr(layer, "cpu_linear") and weight is not None and _address(weight) in packed:
            packed[_address(weight)].append(layer)
    return list(written.values()), list(packed.values())


def _write(changes: list[_Change], layers: list[Any]) -> None:
    """Write into one storage, and pack it while it is in the processor's cache.

    Raises:
        RuntimeError: Something else is read than was written.
    """
    if not all(change.write_into(_storage(change.piece.held)) for change in changes):
        raise RuntimeError("what was written is not what is read")
    if layers:
        first, *others = layers
        first.quant_method.process_weights_after_loading(first)
        for other in others:  # layers that are tied compute with the same copy
            other.cpu_linear = first.cpu_linear


def _keep_weights() -> None:
    """On the CPU let vLLM keep what it packs: otherwise there is nothing to change or to read back."""
    from vllm.model_executor.layers import utils  # type: ignore[import-not-found]
    from vllm.platforms import current_platform  # type: ignore[import-not-found]

    if not current_platform.is_cpu():
        return
    pack = utils.dispatch_cpu_unquantized_gemm
    utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: pack(layer, remove_weight=False)


if importlib.util.find_spec("vllm") is not None:  # in its workers; the trainer's tests read files with it
    _keep_weights()

"""What changed between two versions: found, packed, written, read in the server, applied, summed up."""

from __future__ import annotations

import multiprocessing
import threading
import weakref
from collections.abc import Iterable, Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from inference_plugins import atropos_delta
from inference_plugins.atropos_delta import SOURCE, OwnCheckpoint, Receiver
from trainer.model.base_checkpoint import DTYPES, StoredTensor
from trainer.publish.delta.bits import (
    Change,
    _threads,
    add_moves,
    begin_comparison,
    bits,
    compare_by_torch,
    element_sum,
    joined,
    narrowed,
    pack_gaps,
    pack_moves,
    tensor_sum,
    unpack_indices,
    wrapped,
)
from trainer.publish.delta.files import (
    Label,
    PublishedFile,
    delta_name,
    whole_name,
    write_file,
)
from trainer.publish.delta.snapshot import Snapshot
from trainer.publish.delta.update import Update

MODE = 0o700
SMALL = settings(max_examples=40, deadline=None)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bits at all: NaN of every kind, infinities, both zeros."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel() * dtype.itemsize
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).to(torch.bool)
    return torch.randint(0, 256, (size,), generator=generator).to(torch.uint8).view(dtype).reshape(shape)


def changed(tensor: Tensor, share: float, seed: int) -> Tensor:
    """Other bits at a share of the places."""
    other = random_bits(tuple(tensor.shape), tensor.dtype, seed)
    places = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)) < share
    return torch.where(places, other, tensor)


class Served(nn.Module):
    """Holds weights as vLLM does: q, k and v as one, and of two workers each has half of their rows.

    The norm is on both, the head's rows are filled up, and of the experts, which are one tensor here, each
    is loaded by itself; the last matrix is cut by columns.
    """

    def __init__(self, tensors: dict[str, Tensor], rank: int, ranks: int) -> None:
        super().__init__()
        self.rank, self.ranks = rank, ranks
        self.part = {name: self._part(name, tensor) for name, tensor in tensors.items()}
        fused = [self.part[name] for name in ("q", "k", "v")]
        self.qkv = torch.zeros_like(torch.cat(fused))
        self.experts = torch.zeros(2, *self.part["expert.0"].shape, dtype=self.part["expert.0"].dtype)
        self.head = torch.zeros(
            len(self.part["head"]) + 3, *self.part["head"].shape[1:], dtype=torch.bfloat16
        )
        self.own = {name: torch.zeros_like(self.part[name]) for name in ("norm", "down", "scalar", "empty")}
        self.fails_at = ""

    def _part(self, name: str, whole: Tensor) -> Tensor:
        if name in ("norm", "scalar", "empty"):
            return whole
        dim = 1 if name == "down" else 0
        size = whole.shape[dim] // self.ranks
        return whole.narrow(dim, size * self.rank, size)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        rows = len(self.part["q"])
        for name, whole in weights:
            part = self._part(name, whole)
            if name in ("q", "k", "v"):
                self.qkv.narrow(0, "qkv".index(name) * rows, rows).copy_(part)
            elif name.startswith("expert"):
                self.experts[int(name[-1])].copy_(part)
            elif name == "head":
                self.head[: len(part)].data.copy_(part)
            elif name in self.own:
                self.own[name].copy_(part)


def a_model(seed: int = 0) -> dict[str, Tensor]:
    shapes = {
        **dict.fromkeys(("q", "k", "v"), (8, 16)),
        "expert.0": (4, 6),
        "expert.1": (4, 6),
        "head": (10, 16),
        "norm": (16,),
        "down": (16, 8),
        "empty": (0, 4),
        "scalar": (),
    }
    return {
        name: random_bits(shape, torch.bfloat16, seed + place)
        for place, (name, shape) in enumerate(shapes.items())
    }


class Trainer:
    """Publishes versions of tensors into a directory."""

    def __init__(self, directory: Path, tensors: dict[str, Tensor]) -> None:
        self.directory = directory
        self.snapshot = Snapshot(torch.device("cpu"))
        self.update = Update(self.snapshot, 0, tensors.items())
        self.update.sum_up()
        self.live = dict(tensors)

    def whole(self) -> PublishedFile:
        version = int(self.snapshot.version or 0)
        label = Label(version=version, checksum=self.update.checksum)
        layout = self.update.tensors
        shapes = {name: each.shape for name, each in layout.items()}
        path = self.directory / whole_name(version)
        return write_file(path, label, shapes, layout, self.update.held(), mode=MODE)

    def step(self, share: float = 0.1) -> PublishedFile:
        seed = 100 * (int(self.snapshot.version or 0) + 1)
        self.live = {name: changed(each, share, seed) for name, each in self.live.items()}
        return self.publish()

    def publish(self) -> PublishedFile:
        base, version = self.update.checksum, int(self.snapshot.version or 0) + 1
        self.update = Update(self.snapshot, version, self.live.items())
        self.update.sum_up()
        label = Label(
            version=version, checksum=self.update.checksum, base_version=version - 1, base_checksum=base
        )
        path, layout = self.directory / delta_name(version), self.update.choose(whole=False)
        return write_file(path, label, self.update.shapes, layout, self.update.parts, mode=MODE)


class Worker:
    """One worker of a server that was started with some tensors; `computes_in`, if not in their type."""

    def __init__(
        self,
        started_with: dict[str, Tensor],
        rank: int = 0,
        ranks: int = 1,
        *,
        computes_in: torch.dtype | None = None,
    ) -> None:
        held = {name: tensor.to(computes_in or tensor.dtype) for name, tensor in started_with.items()}
        self.model = Served(held, rank, ranks)
        self.model.load_weights(started_with.items())
        self.path = "started/with"

        def tensors() -> Iterator[tuple[str, Tensor]]:
            yield from started_with.items()

        self.receiver = Receiver(self.model, OwnCheckpoint(lambda: self.path, tensors))

    def prepare(self, file: PublishedFile) -> dict[str, Any]:
        self.receiver.prepare(file.name, file.sha256, file.size)
        assert self.receiver._thread is not None
        self.receiver._thread.join()
        return self.receiver.state()

    def take(self, file: PublishedFile) -> str | None:
        state = self.prepare(file)
        if state["error"] is not None:
            return str(state["error"])
        error: str | None = self.receiver.apply(file.name)["error"]
        return error

    def holds(self, tensors: dict[str, Tensor]) -> bool:
        expected = Served(tensors, self.model.rank, self.model.ranks)
        expected.load_weights(tensors.items())
        pairs = [(self.model.qkv, expected.qkv), (self.model.experts, expected.experts)]
        pairs += [
            (self.model.head, expected.head),
            *((self.model.own[n], expected.own[n]) for n in expected.own),
        ]
        return all(torch.equal(bits(ours), bits(theirs)) for ours, theirs in pairs)


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    monkeypatch.setenv(SOURCE, str(tmp_path))
    return Trainer(tmp_path, a_model(1000))


@SMALL
@given(st.sets(st.integers(0, 300_000), max_size=40))
def test_places_come_out_of_their_packing_as_they_went_in(places: set[int]) -> None:
    indices = np.array(sorted(places), dtype=np.int64)
    gaps = np.diff(indices, prepend=-1) - 1
    for each in (gaps, narrowed(gaps)):
        packed = pack_gaps(each)
        assert atropos_delta.indices_from_gaps(packed).tolist() == indices.tolist()
        assert unpack_indices(packed).tolist() == indices.tolist()


@SMALL
@given(
    st.sampled_from(sorted(DTYPES.values(), key=str)),
    st.lists(st.integers(0, 9), max_size=3),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.integers(0, 1 << 30),
)
def test_a_change_leads_from_the_old_bits_to_the_new_ones_and_from_the_old_sum_to_the_new_one(
    dtype: torch.dtype, shape: list[int], share: float, seed: int
) -> None:
    old = random_bits(tuple(shape), dtype, seed)
    new = changed(old, share, seed + 1)
    snapshot = Snapshot(torch.device("cpu"))
    assert snapshot.advance(0, snapshot.copies([("x", old)])) is None
    snapshot.sum_up(None)
    changes = snapshot.advance(1, snapshot.copies([("x", new)]))
    assert changes is not None
    snapshot.sum_up(changes)
    assert torch.equal(bits(snapshot.tensors["x"]), bits(new))
    assert snapshot.sums["x"] == tensor_sum(new)
    assert ("x" in changes) == (not torch.equal(bits(old), bits(new)))
    if (change := changes.get("x")) is not None:
        assert change.count == int((bits(old) != bits(new)).sum())  # nothing travels that is there already
        assert torch.equal(applied(change, old), bits(new).reshape(-1))


def applied(change: Change, old: Tensor) -> Tensor:
    """What a tensor's flat bits are after a change."""
    numbers, places = bits(old).reshape(-1).clone(), unpack_indices(pack_gaps(change.gaps))
    assert (int(places[0]), int(places[-1])) == (change.first, change.last)
    numbers[places] = add_moves(numbers[places], change.moves, change.far)
    return numbers


@SMALL
@given(
    st.sampled_from([torch.bfloat16, torch.float32, torch.bool]),
    st.lists(st.sampled_from([0, 1, 40, 300, 70_000]), min_size=1, max_size=5),
    st.sampled_from([0.001, 0.3, 0.9]),
    st.integers(0, 1 << 30),
)
def test_parts_and_accelerators_find_the_same_change(
    dtype: torch.dtype, sizes: list[int], share: float, seed: int
) -> None:
    """What a part begins with, or an accelerator packs, is what is found and packed at once on the CPU."""
    tensor = random_bits((sum(sizes),), dtype, seed)
    old, new = bits(tensor), bits(changed(tensor, share, seed + 1))
    new[seed % 7 :: 91] += 1
    parts: list[Change] = []
    for start, end in pairwise(accumulate(sizes, initial=0)):
        compare = begin_comparison(old[start:end], new[start:end], start=5 + start, at_most=end)
        parts += compare() or []
    with patch("trainer.publish.delta.bits._COMPARED", 100):  # a thread's piece
        found = begin_comparison(old, new, start=5, at_most=len(new))()
    by_torch = compare_by_torch(old, new, start=5, at_most=len(new))
    if torch.equal(old, new):
        assert parts == found == by_torch == []
        return
    assert found is not None
    assert by_torch is not None
    whole, before = joined(found), old.new_zeros(5)
    for other in (joined(parts), *by_torch):
        assert (other.first, other.last, other.moved_sum) == (whole.first, whole.last, whole.moved_sum)
        assert other.gaps.tolist() == whole.gaps.tolist()
        assert other.gaps.dtype == whole.gaps.dtype
        assert torch.equal(other.moves, whole.moves)
        assert torch.equal(other.far, whole.far)
    assert torch.equal(applied(whole, torch.cat([before, old])), torch.cat([before, new]))
    assert begin_comparison(old, new, at_most=whole.count - 1)() is None
    assert compare_by_torch(old, new, start=0, at_most=whole.count - 1) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_file_is_larger_than_a_full_version_and_few_changes_take_few_bytes(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    old = torch.randn(400, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = Trainer(tmp_path, {"x": old}).whole().size
    for share in (0.0, 0.01, 0.3, 0.6, 0.65, 0.7, 1.0):
        size = Trainer(tmp_path, {"x": old}).step(share).size
        assert size <= 1.02 * whole
        assert size <= 1024 + share * 1.02 * 200_000 * (dtype.itemsize + 2)
    near = Trainer(tmp_path, {"x": old})
    bits(near.live["x"])[:, ::10] += 1  # the next number of the type: a tenth of them
    assert near.publish().size <= 1024 + 1.02 * 20_000 * 2


@SMALL
@given(
    st.sampled_from(sorted(DTYPES.values(), key=str)),
    st.lists(st.integers(-300, 300), max_size=20),
    st.integers(0, 1 << 30),
)
def test_bits_come_out_of_their_moves_as_they_went_in(
    dtype: torch.dtype, steps: list[int], seed: int
) -> None:
    former = bits(random_bits((len(steps),), dtype, seed))
    values = former + torch.tensor(steps).to(former.dtype)
    moves, far = pack_moves(former, values)
    assert torch.equal(add_moves(former, moves, far), values)
    if dtype.itemsize > 1:
        assert len(far) == sum(abs(step) > 127 for step in steps)
    with pytest.raises(ValueError, match="cannot assign"):
        add_moves(former, moves, torch.cat([far, former.new_zeros(len(far) + 2)]))


def test_comparing_takes_as_many_threads_as_torch_and_no_team_for_each() -> None:
    usual = torch.get_num_threads()
    old = torch.zeros(16 << 20, dtype=torch.int16)
    new = old.clone()
    new[::8] += 1
    try:
        _threads.cache_clear()
        torch.set_num_threads(8)
        torch.ones(1 << 22).sum()  # this thread's own team
        before = len(list(Path("/proc/self/task").iterdir()))
        assert begin_comparison(old, new, at_most=len(old))()
        assert len(list(Path("/proc/self/task").iterdir())) - before <= 8
    finally:
        torch.set_num_threads(usual)
        _threads().shutdown()
        _threads.cache_clear()


def test_a_forked_process_compares_with_threads_of_its_own() -> None:
    old = torch.zeros(1 << 21, dtype=torch.int16)  # more than one thread's piece
    new = old + 1

    def compare() -> None:
        assert begin_comparison(old, new, at_most=len(old))()

    compare()
    child = multiprocessing.get_context("fork").Process(target=compare)
    child.start()
    child.join(20)
    child.kill()
    assert child.exitcode == 0


@pytest.mark.parametrize("at_once", [False, True])
def test_an_update_is_what_the_weights_were_when_it_was_made_and_holds_no_copy_twice(at_once: bool) -> None:
    live, snapshot = torch.randn(300, 20), Snapshot(torch.device("cpu"))
    first = Update(snapshot, 0, [("x", live)], at_once=at_once)
    first.sum_up()
    former = weakref.ref(snapshot.tensors["x"])
    live[::7] += 1
    taken = live.clone()
    update = Update(snapshot, 1, [("x", live)], at_once=at_once)
    live[::3] += 1  # the next step
    update.sum_up()
    assert torch.equal(snapshot.tensors["x"], taken)
    assert update.sums == {"x": tensor_sum(taken)}
    assert former() is None


def test_sums_follow_a_version_once_however_often_they_are_asked_for() -> None:
    weight, snapshot = torch.randn(300, 20), Snapshot(torch.device("cpu"))
    for version in (0, 1, 1, 2):  # a version that could not be written is taken again
        changes = snapshot.advance(version, snapshot.copies([("x", weight)]))
        snapshot.sum_up(changes)
        snapshot.sum_up(changes)
        assert snapshot.sums == {"x": tensor_sum(weight)}
        weight[::7] += 1


def test_weights_that_lie_transposed_in_memory_are_followed() -> None:
    live = torch.randn(6, 5).to(torch.bfloat16).T
    snapshot = Snapshot(torch.device("cpu"))
    for version in range(3):
        snapshot.advance(version, snapshot.copies([("x", live)]))
        assert torch.equal(snapshot.tensors["x"], live)
        live = live.clone()
        live[1, version] += 1


@SMALL
@given(st.integers(0, 1 << 30), st.integers(1, 40))
def test_sums_of_parts_add_up_to_the_sum_of_the_whole(seed: int, cut: int) -> None:
    whole = random_bits((41, 3), torch.bfloat16, seed)
    numbers, indices = bits(whole).reshape(-1), torch.arange(whole.numel())
    parts = [element_sum(indices[rows], numbers[rows]) for rows in (slice(0, cut), slice(cut, None))]
    assert wrapped(sum(parts)) == tensor_sum(whole) == atropos_delta.element_sum(indices, numbers)


@pytest.mark.parametrize("ranks", [1, 2])
def test_workers_follow_versions_bit_by_bit_and_say_what_they_hold(ranks: int, trainer: Trainer) -> None:
    workers = [Worker(a_model(), rank, ranks) for rank in range(ranks)]
    files = [trainer.whole(), *(trainer.step(share) for share in (0.1, 0.0, 1.0, 0.3))]
    told: list[dict[str, list[int]]] = []
    for file in files:
        told = [worker.prepare(file)["sums"] for worker in workers]
        assert [worker.receiver.apply(file.name)["error"] for worker in workers] == [None] * ranks
    assert all(worker.holds(trainer.live) for worker in workers)
    for name, tensor in trainer.live.items():
        counts = sum(each[name][1] for each in told)
        copies = counts // max(1, tensor.numel())
        assert counts == copies * tensor.numel()
        assert wrapped(sum(each[name][0] for each in told)) == wrapped(copies * trainer.snapshot.sums[name])
    state = workers[0].receiver.state()
    assert (state["version"], state["checksum"]) == (4, trainer.update.checksum)


def test_a_lost_repeated_reordered_or_damaged_delta_changes_nothing(trainer: Trainer) -> None:
    worker = Worker(a_model())
    assert "changes version 0" in str(worker.take(trainer.step()))  # there is no full version before it
    assert worker.take(trainer.whole()) is None
    before, second, third = dict(trainer.live), trainer.step(), trainer.step()
    assert "changes version 2" in str(worker.take(third))  # the second is lost, or comes after it
    path = trainer.directory / second.name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "damaged" in str(worker.take(second))
    path.write_bytes(content[:-5])
    assert "damaged" in str(worker.take(second))
    assert worker.holds(before)
    path.write_bytes(content)
    assert worker.take(second) is None
    assert "changes version 1" in str(worker.take(second))  # repeated
    assert worker.take(third) is None
    assert worker.holds(trainer.live)


def test_another_model_under_the_same_number_is_refused(trainer: Trainer, tmp_path: Path) -> None:
    worker = Worker(a_model())
    assert worker.take(trainer.whole()) is None
    other = Trainer(tmp_path, a_model(5000))
    assert "changes version 0" in str(worker.take(other.step()))


def test_a_worker_that_fails_half_way_takes_nothing_but_a_full_version(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(a_model())
    assert worker.take(trainer.whole()) is None
    second = trainer.step()
    state = worker.prepare(second)
    assert state["error"] is None
    real, calls = atropos_delta._Change.write_into, []

    def fails_at_the_third(change: Any, storage: Tensor) -> bool:
        calls.append(change)
        return len(calls) != 3 and real(change, storage)

    with monkeypatch.context() as patched:
        patched.setattr(atropos_delta._Change, "write_into", fails_at_the_third)
        assert "half-way" in worker.receiver.apply(second.name)["error"]
    assert worker.receiver.state()["version"] is None
    assert "holds None" in str(worker.take(second))
    assert worker.take(trainer.whole()) is None
    assert worker.holds(trainer.live)


def test_a_worker_writes_with_a_few_threads_on_however_many_cores(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each packs with torch's own threads besides: as many as the square of the cores would be too many."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    real, threads, full = atropos_delta._Change.write_into, set(), threading.Event()

    def one_more_thread(change: Any, storage: Tensor) -> bool:
        threads.add(threading.get_ident())
        if len(threads) == 4:
            full.set()
        return full.wait(10) and real(change, storage)

    monkeypatch.setattr(atropos_delta._Change, "write_into", one_more_thread)
    worker = Worker(a_model())
    assert worker.take(trainer.whole()) is None
    assert worker.holds(trainer.live)
    assert len(threads) == 4


def test_weights_that_somebody_else_has_loaded_are_no_base_for_a_delta(trainer: Trainer) -> None:
    worker = Worker(a_model())
    assert worker.take(trainer.whole()) is None
    worker.model.load_weights(a_model().items())
    worker.path = "another/directory"
    assert "holds None" in str(worker.take(trainer.step()))


@pytest.mark.parametrize("name", ["reload_weights", "update_weights"])
def test_a_worker_whose_weights_vllm_itself_changes_holds_no_version_any_more(
    name: str, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = a_model()
    served = Served(base, 0, 1)
    served.load_weights(base.items())

    class VllmWorker(atropos_delta.AtroposDelta):
        def get_model(self) -> Served:
            return served

        def reload_weights(self) -> None:  # from the path that it has: nothing else tells
            served.load_weights(base.items())

        update_weights = reload_weights

    own = OwnCheckpoint(lambda: "started/with", lambda: iter(base.items()))
    monkeypatch.setattr(atropos_delta, "own_checkpoint", lambda _: own)
    worker = VllmWorker()

    def prepare(file: PublishedFile) -> dict[str, Any]:
        worker.atropos_delta_prepare(file.name, file.sha256, file.size)
        worker._atropos_receiver._thread.join()  # type: ignore[attr-defined]
        return worker.atropos_delta_state()

    first = trainer.whole()
    assert prepare(first)["error"] is None
    assert worker.atropos_delta_apply(first.name)["error"] is None
    second = trainer.step()
    assert prepare(second)["ready"] == second.name
    getattr(worker, name)()
    assert worker.atropos_delta_state()["version"] is None
    assert "not any more" in worker.atropos_delta_apply(second.name)["error"]
    assert "holds None" in prepare(second)["error"]
    whole = trainer.whole()
    assert prepare(whole)["error"] is None
    assert worker.atropos_delta_apply(whole.name)["error"] is None
    expected = Served(trainer.live, 0, 1)
    expected.load_weights(trainer.live.items())
    assert torch.equal(bits(served.qkv), bits(expected.qkv))


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    layout = {"x": StoredTensor(torch.float32, (4,))}

    def parts() -> Iterator[tuple[str, Tensor]]:
        yield "x", torch.zeros(4)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_file(
            tmp_path / whole_name(1), Label(version=1, checksum=""), {"x": (4,)}, layout, parts(), mode=MODE
        )
    assert not list(tmp_path.iterdir())


def test_a_layout_that_is_not_the_checkpoints_is_refused(trainer: Trainer) -> None:
    worker = Worker(a_model())
    worker.model.experts.copy_(worker.model.experts.flip(1))  # as kernels want them
    assert "is not held as" in str(worker.take(trainer.whole()))
    assert worker.receiver.state()["unfit"]


def test_a_server_that_computes_in_another_type_than_its_base_follows_deltas_in_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SOURCE, str(tmp_path))
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(each.shape, generator=generator) for name, each in a_model().items()}
    trainer = Trainer(tmp_path, {name: tensor.to(torch.bfloat16) for name, tensor in base.items()})
    worker = Worker(base, computes_in=torch.bfloat16)
    assert worker.take(trainer.whole()) is None
    assert worker.take(trainer.step()) is None
    assert worker.holds(trainer.live)
    base["q"] += 0.01
    other = Worker(base, computes_in=torch.bfloat16)
    base["q"] -= 0.01
    assert "is not held as the checkpoint" in str(other.take(trainer.whole()))


def test_a_type_that_is_not_the_servers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SOURCE, str(tmp_path))
    wide = Trainer(tmp_path, {name: tensor.float() for name, tensor in a_model().items()})
    assert "in the type that the server computes in" in str(Worker(a_model()).take(wide.whole()))


@pytest.mark.parametrize("name", ["../v000000.whole.safetensors", "/etc/passwd", "v000000", "link"])
def test_nothing_outside_the_published_directory_is_read(name: str, trainer: Trainer, tmp_path: Path) -> None:
    file = trainer.whole()
    worker = Worker(a_model())
    if name == "link":
        (tmp_path / file.name).rename(tmp_path / "elsewhere")
        (tmp_path / file.name).symlink_to(tmp_path / "elsewhere")
        name = file.name
    error = worker.take(PublishedFile(name=name, size=file.size, sha256=file.sha256))
    assert "no name of a published file" in str(error) or "symbolic links" in str(error)


def test_a_model_with_weights_that_no_checkpoint_fills_is_refused(trainer: Trainer) -> None:
    worker = Worker(a_model())
    worker.model.other = nn.Parameter(torch.ones(3))
    assert "fills the model's other" in str(worker.take(trainer.whole()))


def test_a_worker_that_still_reads_is_not_waited_for(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, goes_on, file = Worker(a_model()), threading.Event(), trainer.whole()
    real = atropos_delta.open_source

    def slowly(*words: Any) -> Any:
        assert goes_on.wait(30)
        return real(*words)

    monkeypatch.setattr(atropos_delta, "open_source", slowly)
    assert worker.receiver.prepare(file.name, file.sha256, file.size)["error"] is None
    assert "still being read" in worker.receiver.prepare(file.name, file.sha256, file.size)["error"]
    assert "not ready" in worker.receiver.apply(file.name)["error"]
    goes_on.set()
    assert worker.receiver._thread is not None
    worker.receiver._thread.join()
    assert worker.take(file) is None

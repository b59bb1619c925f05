"""The stream of live weights: the checkpoint's own names and bits, in bounded memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.profiler import ProfilerActivity, profile
from transformers import MixtralConfig, MixtralForCausalLM

from tests.trainer.models import VOCABULARY, cast_weights, change_adapter, stream_of, tiny_model, with_adapter
from trainer.errors import CheckpointError
from trainer.export.hf_model import write_model_directory
from trainer.model import sharding
from trainer.model.sharding import Spread
from trainer.model.weight_stream import WeightStream
from trainer.model.wrappers import unwrap_training
from trainer.publish.delta.snapshot import Snapshot

MIB = 1 << 20


def collect(stream: WeightStream) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in stream.weights()}


def written(model: nn.Module, path: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """What PEFT and transformers merge and write themselves."""
    inner = unwrap_training(copy.deepcopy(model))
    if hasattr(inner, "merge_and_unload"):
        inner = inner.merge_and_unload()
    inner.save_pretrained(path, state_dict=cast_weights(inner.state_dict(), dtype))
    return load_file(path / "model.safetensors")


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    """A model with an adapter that changes it."""
    result: nn.Module = with_adapter(model, **options)
    change_adapter(result, 1)
    return result


def mixture() -> nn.Module:
    """In memory its experts are one tensor per layer, in the checkpoint one per expert and projection."""
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=3,
            num_experts_per_tok=2,
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: tiny_model("qwen2", dtype=torch.float32),
    "tied": lambda: tiny_model("llama", dtype=torch.float32),
    "transposed": lambda: tiny_model("gpt2", dtype=torch.float32),
    "compiled": lambda: torch.compile(tiny_model("llama", dtype=torch.float32), backend="eager"),
    "adapted": lambda: adapted(tiny_model("llama", dtype=torch.float32)),
    "adapted in half precision": lambda: adapted(tiny_model("qwen2", dtype=torch.bfloat16)),
    "experts": mixture,
}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as it is", "bfloat16"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_stream_is_what_transformers_writes(kind: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    model = MODELS[kind]()
    stream = stream_of(model, dtype)
    expected = written(model, tmp_path / "out", dtype)
    if kind == "adapted in half precision":  # PEFT rounds once more
        torch.testing.assert_close(collect(stream), expected, rtol=2**-7, atol=2**-9)
    else:
        assert_same(collect(stream), expected)


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_announced_is_what_comes_every_time(kind: str) -> None:
    stream = stream_of(MODELS[kind](), torch.float16)
    announced = [(entry.name, entry.dtype, entry.shape) for entry in stream.entries()]
    for _ in range(2):
        one_by_one = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in stream.weights()]
        assert one_by_one == announced
    assert stream.total_bytes == sum(tensor.nbytes for _, tensor in stream.weights())
    assert stream.largest_bytes == max(tensor.nbytes for _, tensor in stream.weights())
    assert stream.dtype_name == "float16"


def test_announcing_touches_no_data() -> None:
    with torch.device("meta"):
        model = tiny_model("llama", dtype=torch.float32)
    real = stream_of(tiny_model("llama", dtype=torch.float32), torch.bfloat16)
    assert WeightStream(model, real.base).entries() == real.entries()


def test_the_weights_are_read_when_they_are_asked_for() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    stream = stream_of(model, torch.bfloat16)
    before = collect(stream)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)  # exact in any type
    after = collect(stream)
    assert all(torch.equal(after[name], 2.0 * before[name]) for name in before)


def test_an_adapter_stays_apart_from_the_weights_it_adapts() -> None:
    model = adapted(tiny_model("llama", dtype=torch.float32))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    collect(stream_of(model, torch.bfloat16))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def allocated_peak(action: Callable[[], object]) -> int:
    """Bytes that the CPU allocator gave out at once while `action` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as session:
        action()
    assert session.profiler is not None
    assert session.profiler.kineto_results is not None
    current = peak = 0
    events = session.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


def wide_model(*, adapter: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    return adapted(model) if adapter else model


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapted"])
def test_the_memory_beside_the_model_is_one_weight(adapter: bool, tmp_path: Path) -> None:
    stream = stream_of(wide_model(adapter=adapter), torch.bfloat16)
    whole = stream.total_bytes
    assert whole > 10 * MIB
    snapshot = Snapshot(torch.device("cpu"))

    everything = allocated_peak(lambda: snapshot.advance(1, snapshot.copies(stream.weights())))
    assert everything >= whole  # the measurement sees what is held
    largest_in_memory = 2 * stream.largest_bytes  # float32
    merging = 3 * largest_in_memory if adapter else 0  # the difference, its product's own, the sum
    allowed = stream.largest_bytes + merging + 4096
    assert allocated_peak(lambda: write_model_directory(tmp_path / "written", stream)) <= allowed
    assert allocated_peak(lambda: snapshot.advance(2, snapshot.copies(stream.weights()))) <= (
        allowed + stream.largest_bytes  # as it is cast, and its copy
    )


def test_a_spread_weight_is_cast_and_gathered_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """On process 0 of two, whose other one has the same numbers below 0."""

    def gather(piece: Tensor, pieces: list[Tensor], **_: object) -> None:
        pieces[0].copy_(piece)
        torch.neg(piece, out=pieces[1])

    monkeypatch.setattr(distributed, "gather", gather)
    monkeypatch.setattr(sharding, "GATHERED_BYTES", 1 << 16)
    own, found = torch.randn(1000, 511), []
    spread, shape = Spread(parts=2), torch.Size([2000, 511])
    peak = allocated_peak(lambda: found.append(spread._gather(own, shape, 0, torch.bfloat16, None)))
    assert found[0] is not None
    assert torch.equal(found[0], torch.cat([own, -own]).bfloat16())
    assert peak <= found[0].nbytes + (1 << 16)


def test_nothing_is_copied_where_nothing_has_to_be_cast() -> None:
    stream = stream_of(wide_model(), torch.float32)

    def send() -> None:
        for _ in stream.weights():
            pass

    assert allocated_peak(send) <= 4096


def test_a_layer_that_was_exchanged_is_noticed() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    stream = stream_of(model)
    model.model.norm.weight = nn.Parameter(torch.ones(33))
    with pytest.raises(CheckpointError, match=r"model.norm.weight has shape \[33\], and had"):
        collect(stream)


def test_adapters_that_cannot_be_merged_by_adding_are_refused() -> None:
    model = adapted(tiny_model("llama", dtype=torch.float32), use_dora=True)
    with pytest.raises(CheckpointError, match="DoRA"):
        collect(stream_of(model))


def test_a_tied_weight_that_only_one_of_its_names_adapts_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted(tiny_model("llama", dtype=torch.float32), target_modules=["lm_head"])
    with pytest.raises(CheckpointError, match=r"lm_head.weight.* tied"):
        stream_of(model)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_cuda
@pytest.mark.parametrize("kind", ["tied", "adapted", "experts"])
def test_on_a_gpu_the_stream_is_what_the_directory_holds(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]().to("cuda")
    stream = stream_of(model, torch.bfloat16)
    assert stream.device.type == "cuda"
    streamed = {name: tensor.cpu() for name, tensor in collect(stream).items()}
    assert_same(streamed, written(model, tmp_path / "out", torch.bfloat16))


@needs_cuda
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapted"])
def test_on_a_gpu_the_memory_beside_the_model_is_one_weight(adapter: bool) -> None:
    model = wide_model(adapter=adapter).to("cuda")
    stream = stream_of(model, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _name, _tensor in stream.weights():
        pass
    extra = torch.cuda.max_memory_allocated() - before
    merging = 6 * stream.largest_bytes if adapter else 0
    rounding = 512 * len(stream.entries())  # the allocator's granularity
    assert extra <= 2 * stream.largest_bytes + merging + rounding


@needs_cuda
@pytest.mark.parametrize("kind", ["adapted", "experts"])
def test_on_a_gpu_senders_may_alternate_between_streams(kind: str) -> None:
    """As vLLM's packed transfer does: two CUDA streams in turn, which know nothing of each other."""
    model = MODELS[kind]().to("cuda")
    stream = stream_of(model, torch.bfloat16)
    expected = collect(stream)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(20):
        received = {}
        weights = stream.weights()
        for number in range(len(expected)):
            with torch.cuda.stream(streams[number % 2]):
                torch.cuda._sleep(20_000)  # type: ignore[no-untyped-call]  # what comes first is not done first
                name, tensor = next(weights)
                received[name] = tensor.clone()
                del tensor
        torch.cuda.synchronize()
        assert_same(received, expected)

"""Model directories: the base with new weights, and never half there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.forked import run_module
from tests.trainer import architectures
from tests.trainer.batches import make_bodies
from tests.trainer.models import base_of, stream_of, tiny_model
from tests.trainer.runs import run
from trainer.check._local import check_model
from trainer.config import load_config
from trainer.errors import CheckpointError, ConfigurationError
from trainer.export.hf_model import capture_model, write_model_directory, write_without_copy
from trainer.model.base_checkpoint import read_base
from trainer.model.weight_stream import WeightStream

TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35]])

ROOT = Path(__file__).parents[2]
TRANSFORMERS_4 = ROOT / ".venv-transformers4"
NO_LEARNING = ("--optimizer.learning_rate", "0")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases as the installed transformers writes them, by architecture."""
    directory = tmp_path_factory.mktemp("bases")
    for name in architectures.ARCHITECTURES:
        architectures.make(name, directory / name)
    return directory


@pytest.fixture(scope="session")
def bases_of_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases as transformers 4 writes them, by architecture."""
    directory = tmp_path_factory.mktemp("bases_of_4")
    with_transformers_4("make", directory)
    return directory


def with_transformers_4(*words: str | Path) -> None:
    if not (TRANSFORMERS_4 / ".ready").exists():
        assert not os.environ.get("REQUIRE_TRANSFORMERS4"), "make transformers4"
        pytest.skip("transformers 4 is not installed beside version 5: make transformers4")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.trainer.architectures", *map(str, words)],
        env=os.environ | {"PYTHONPATH": f"{TRANSFORMERS_4}{os.pathsep}{ROOT}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def assert_equal_files(directory: Path, base: Path) -> None:
    ours, theirs = files(directory), files(base)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=TOKENS).logits
    return result


def load(path: Path, **options: Any) -> PreTrainedModel:
    result: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, **options)
    return result


def load_as_trained(path: Path) -> PreTrainedModel:
    return load(path, dtype=torch.float32)


def write_and_resume(path: Path, out: Path) -> None:
    """Write what was loaded from `path`: captured, as a checkpoint, and loaded from that one."""
    model, base = load_as_trained(path), read_base(str(path))
    capture_model(WeightStream(model, base))(out / "captured")
    write_model_directory(out / "checkpoint", WeightStream(model, base, dtype=torch.float32))
    write_model_directory(out / "resumed", WeightStream(load_as_trained(out / "checkpoint"), base))


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
def test_without_learning_the_directory_equals_the_base(
    architecture: str, bases: Path, tmp_path: Path
) -> None:
    base = bases / architecture
    assert {torch.float32, torch.bfloat16} == {t.dtype for t in read_base(str(base)).tensors.values()}
    write_and_resume(base, tmp_path)
    assert_equal_files(tmp_path / "captured", base)
    assert_equal_files(tmp_path / "resumed", base)
    kinds = {tensor.dtype for tensor in load_file(tmp_path / "checkpoint/model.safetensors").values()}
    assert kinds == {torch.float32}
    assert files(tmp_path / "checkpoint")["config.json"] == files(base)["config.json"]


def test_transformers_4_reads_what_was_trained_from_its_bases(bases_of_4: Path, tmp_path: Path) -> None:
    for name in architectures.ARCHITECTURES:
        path = bases_of_4 / name
        model = load_as_trained(path)
        stream = WeightStream(model, read_base(str(path)))
        write_model_directory(tmp_path / "same" / name, stream)
        assert_equal_files(tmp_path / "same" / name, path)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        write_model_directory(tmp_path / "trained" / name, stream)
    trained = [tmp_path / "trained" / name for name in architectures.ARCHITECTURES]
    with_transformers_4("read", tmp_path / "logprobs", *trained)
    theirs = load_file(tmp_path / "logprobs")
    for directory in trained:
        ours = architectures.logprobs(directory)
        torch.testing.assert_close(theirs[str(directory)], ours, rtol=0, atol=1e-5)


@pytest.fixture
def odd_base(tiny_model_directory: Path, tmp_path: Path) -> Path:
    """A base in shards and of two types, with files, tensors and names of several origins."""
    base = tmp_path / "odd"
    shutil.copytree(tiny_model_directory, base)
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    (base / "generation_config.json").write_bytes(b'{"eos_token_id" : [2],\r\n "temperature":0.6}')
    (base / "preprocessor_config.json").write_bytes(b"{}")
    (base / "tokenizer_config.json").write_bytes((base / "tokenizer_config.json").read_bytes() + b"\n\n")
    (base / "LICENSE").write_bytes(b"Do as you like.")
    config = json.loads((base / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype", "float32")
    config["quirk"] = {"torch_dtype": "float32"}
    (base / "config.json").write_text(json.dumps(config, indent=7))
    weights = {
        name: tensor if "norm" in name else tensor.to(torch.bfloat16) for name, tensor in weights.items()
    }
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()  # tied, and stored twice
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(8)
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file(
            {name: weights[name] for name in held}, base / shard, metadata={"format": "pt", "by": "hand"}
        )
    size = sum(tensor.nbytes for tensor in weights.values())
    index = {
        "metadata": {"total_size": size},
        "weight_map": {name: shard for shard, held in shards.items() for name in held},
    }
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    return base


def test_a_run_without_learning_ends_with_its_base(odd_base: Path, tmp_path: Path) -> None:
    original = shutil.copytree(odd_base, tmp_path / "original")
    left_out = ("README.md", "pytorch_model.bin", "optimizer.pt", "model.gguf", "modeling.py")
    for name in (*left_out, "other.safetensors", "pytorch_model.bin.index.json"):
        (odd_base / name).write_bytes(b"{}")
    output = tmp_path / "run"
    run(odd_base, output, make_bodies(2), *NO_LEARNING, steps=2)
    assert_equal_files(output / "final", original)
    shutil.rmtree(output / "final")
    run(odd_base, output, make_bodies(1), *NO_LEARNING, steps=3)
    assert_equal_files(output / "final", original)


def test_a_run_trains_all_names_of_a_tied_weight_and_nothing_else(odd_base: Path, tmp_path: Path) -> None:
    run(odd_base, tmp_path / "run", make_bodies(1), steps=1)
    before, after = (
        {
            name: tensor
            for file in sorted(directory.glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        for directory in (odd_base, tmp_path / "run/final")
    )
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])


def test_a_run_with_adapters_ends_with_the_base_and_merged_weights(odd_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(odd_base, output, make_bodies(1), *NO_LEARNING, "--model.lora.rank", "2", steps=1)
    assert_equal_files(output / "final", odd_base)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_a_tied_weight_is_refused_at_the_start(
    target: str, tiny_model_directory: Path, tmp_path: Path
) -> None:
    adapter = ("--model.lora.target_modules", json.dumps([target, "q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns as well
        with pytest.raises(ConfigurationError, match=r"are tied.*leave them out of model\.lora"):
            run(tiny_model_directory, tmp_path / "run", make_bodies(1), *adapter, steps=1)
    assert not (tmp_path / "run").exists()
    config = load_config(None, ["--model.path", str(tiny_model_directory), *adapter], environment={})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (result, *_), _ = check_model(config)
    assert result.status == "failed"
    assert "are tied" in result.found


def test_names_of_an_older_layout_are_kept(bases: Path, tmp_path: Path) -> None:
    """The GPT-2 of the hub has no prefix, and buffers that nobody loads."""
    base = shutil.copytree(bases / "gpt2", tmp_path / "base")
    weights = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(base / "model.safetensors").items()
    }
    weights["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(weights, base / "model.safetensors")
    write_and_resume(base, tmp_path)
    assert_equal_files(tmp_path / "captured", base)
    assert_equal_files(tmp_path / "resumed", base)


def test_tensors_that_the_model_does_not_have_are_copied(bases: Path, tmp_path: Path) -> None:
    base = shutil.copytree(bases / "qwen3-next-hybrid", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["mtp.layers.0.weight"] = torch.randn(3, 5).to(torch.float16)  # for multi-token prediction
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    write_and_resume(base, tmp_path)
    assert_equal_files(tmp_path / "captured", base)
    assert_equal_files(tmp_path / "resumed", base)


def test_the_tokenizer_may_come_from_elsewhere(tiny_model_directory: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(tiny_model_directory, tmp_path / "elsewhere")
    for path in elsewhere.iterdir():
        path.write_bytes(path.read_bytes() + b" ")
    written = read_base(str(tiny_model_directory), tokenizer_path=str(elsewhere)).files
    changed = {name for name in written if written[name].endswith(b" ")}
    assert {"tokenizer.json", "tokenizer_config.json"} <= changed
    assert {"config.json"} <= written.keys() - changed


def test_a_base_from_the_hub_is_found_in_the_cache(
    odd_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "hub/models--someone--model"
    shutil.copytree(odd_base, cached / "snapshots/0123abcd")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("0123abcd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = read_base("someone/model")
    assert found.files == read_base(str(odd_base)).files
    assert found.tensors == read_base(str(odd_base)).tensors


def test_code_of_the_model_goes_with_it_if_it_is_trusted(odd_base: Path) -> None:
    (odd_base / "modeling_odd.py").write_bytes(b"# code")
    assert "modeling_odd.py" not in read_base(str(odd_base)).files
    assert read_base(str(odd_base), trust_remote_code=True).files["modeling_odd.py"] == b"# code"


def test_an_index_cannot_name_files_elsewhere(odd_base: Path) -> None:
    index = {"weight_map": {"x": "../odd/model-00001-of-00002.safetensors"}}
    (odd_base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="which is not a safetensors file beside it"):
        read_base(str(odd_base))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_another_type_are_declared(dtype: torch.dtype, odd_base: Path, tmp_path: Path) -> None:
    base = read_base(str(odd_base)).declaring(dtype)
    write_model_directory(tmp_path / "out", WeightStream(load_as_trained(odd_base), base, dtype=dtype))
    written = read_base(str(tmp_path / "out"))
    kinds = {name: tensor.dtype for name, tensor in written.tensors.items()}
    assert kinds.pop("model.layers.0.self_attn.rotary_emb.inv_freq") == torch.float32  # not the model's
    assert set(kinds.values()) == {dtype}
    text = (odd_base / "config.json").read_text()
    name = str(dtype).removeprefix("torch.")
    assert (tmp_path / "out/config.json").read_text() == text.replace("float32", name)
    index = json.loads(written.files["model.safetensors.index.json"])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in written.tensors.values())
    assert load(tmp_path / "out", dtype="auto").dtype == dtype


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama", dtype=torch.float32)


def test_modules_that_must_stay_float32_stay_float32(model: PreTrainedModel, tmp_path: Path) -> None:
    model._keep_in_fp32_modules_strict = {"norm"}
    write_model_directory(tmp_path / "out", WeightStream(model, base_of(model), dtype=torch.bfloat16))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["model.norm.weight"].dtype == torch.float32
    assert written["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_writing_leaves_the_model_and_its_configuration_alone(model: PreTrainedModel, tmp_path: Path) -> None:
    stream = stream_of(model, torch.float16)
    model.config.dtype = torch.bfloat16
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write_model_directory(tmp_path / "out", stream)
    assert model.config.dtype == torch.bfloat16
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.dtype == torch.float32


def test_without_a_copy_weights_are_written_as_they_are_made(model: PreTrainedModel, tmp_path: Path) -> None:
    made: list[weakref.ref[Tensor]] = []

    class Watched(WeightStream):
        def weights(self, owners: Any = None) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in super().weights(owners):
                # Whoever writes may still hold the last one.
                assert [each() for each in made[:-1]] == [None] * len(made[:-1])
                made.append(weakref.ref(tensor))
                yield name, tensor

    base = base_of(model, torch.bfloat16)
    write_model_directory(tmp_path / "copied", WeightStream(model, base, dtype=torch.bfloat16))
    stream = Watched(model, base, dtype=torch.bfloat16)
    write_without_copy(tmp_path / "ours", stream)
    assert files(tmp_path / "ours") == files(tmp_path / "copied")
    weights = len(made)
    assert weights == len(stream.entries())
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write the model"):
        write_without_copy(tmp_path / "file" / "below", stream)
    assert len(made) == 2 * weights, "processes that send rows are waited for"


def test_a_capture_is_what_the_model_was(model: PreTrainedModel, tmp_path: Path) -> None:
    stream = stream_of(model)
    before = logits(model)
    write = capture_model(stream)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    write(tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), before)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrappers_are_stripped(wrap: Any, model: PreTrainedModel, tmp_path: Path) -> None:
    write_model_directory(tmp_path / "out", WeightStream(wrap(model), base_of(model)))
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_lora_adapters_are_merged_and_the_model_keeps_them_apart(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at first, so that the adapter does nothing
            nn.init.normal_(parameter, std=0.5)
    write_model_directory(tmp_path / "out", stream_of(adapted))
    merged = load(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-4)
    with adapted.disable_adapter():
        assert not torch.allclose(logits(merged), logits(adapted), atol=1e-2)
    assert torch.equal(adapted.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight, before)


def test_a_base_that_lacks_a_weight_or_has_another_shape_is_refused(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    write_model_directory(tmp_path, stream_of(model), replace=True)
    weights = load_file(tmp_path / "model.safetensors")
    cases = {
        "the base has no weight": {key: tensor for key, tensor in weights.items() if key != name},
        "has shape": weights | {name: torch.zeros(3, 3)},
    }
    for complaint, found in cases.items():
        save_file(found, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=complaint):
            WeightStream(model, read_base(str(tmp_path)))


def test_an_existing_directory_is_only_replaced_when_asked(model: PreTrainedModel, tmp_path: Path) -> None:
    stream = stream_of(model)
    write_model_directory(tmp_path / "out", stream)
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0)
    with pytest.raises(CheckpointError, match="exists already"):
        write_model_directory(tmp_path / "out", stream)
    assert not torch.equal(logits(load(tmp_path / "out")), logits(model))
    write_model_directory(tmp_path / "out", stream, replace=True)
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_while_writing_leaves_nothing_behind(odd_base: Path, tmp_path: Path) -> None:
    stream = WeightStream(load_as_trained(odd_base), read_base(str(odd_base)))
    for shard in odd_base.glob("*.safetensors"):
        os.truncate(shard, 100)
    with pytest.raises(CheckpointError, match="was cut off while the run lasted"):
        write_model_directory(tmp_path / "out/model", stream)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("mode", ["new", "replace"])
def test_a_process_killed_at_any_moment_leaves_a_whole_directory_or_none(mode: str, tmp_path: Path) -> None:
    """Of files of a few bytes: checkpoints, which hold a model directory, have such a test of their own."""
    done = run_module("tests.trainer.directory_crashes", tmp_path, mode)
    assert done.returncode == 0, done.stderr
    *killed, finished = [tuple(line.split()) for line in done.stdout.splitlines()]
    assert finished == ("0", "new,new")
    assert len(killed) > 10
    assert {status for status, _ in killed} == {str(int(signal.SIGKILL))}
    before = {"absent"} if mode == "new" else {"old,old", "absent"}
    assert {held for _, held in killed} <= {"new,new", *before}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # the next writer has cleaned up

"""Model directories: complete, plain, cast as asked, and never half there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.trainer.models import tiny_model
from trainer.errors import CheckpointError
from trainer.model_directory import plain_state_dict, write_model_directory

TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35]])


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama", dtype=torch.float32)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=TOKENS).logits
    return result


def load(path: Path, **options: Any) -> PreTrainedModel:
    result: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, **options)
    return result


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral", "gpt2"])
def test_the_directory_loads_as_the_same_model(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, dtype=torch.float32)
    write_model_directory(tmp_path / "out", model=model, tokenizer=None)
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_the_tokenizer_lies_beside_the_weights(tiny_model_directory: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_directory)
    write_model_directory(tmp_path / "out", model=load(tiny_model_directory), tokenizer=tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.encode("Grüße, 2+2") == tokenizer.encode("Grüße, 2+2")
    chat = [{"role": "user", "content": "hello"}]
    assert again.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(
        chat, tokenize=False
    )


def test_nothing_in_the_directory_is_a_pickle(model: PreTrainedModel, tmp_path: Path) -> None:
    write_model_directory(tmp_path / "out", model=model, tokenizer=None)
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".safetensors"}


def test_tied_weights_are_written_once(model: PreTrainedModel, tmp_path: Path) -> None:
    write_model_directory(tmp_path / "out", model=model, tokenizer=None, dtype=torch.bfloat16)
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight", "both as copies"])
def test_a_gathered_state_dict_may_hold_tied_weights_once_or_as_copies(
    kept: str, model: PreTrainedModel, tmp_path: Path
) -> None:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        if kept not in (name, "both as copies"):
            del weights[name]
    write_model_directory(tmp_path / "out", model=model, tokenizer=None, state_dict=weights)
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_tied_weights_that_differ_are_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights["lm_head.weight"] += 1.0
    with pytest.raises(CheckpointError, match="tied in the model but differ"):
        write_model_directory(tmp_path / "out", model=model, tokenizer=None, state_dict=weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_cast_and_the_configuration_says_so(
    dtype: torch.dtype, model: PreTrainedModel, tmp_path: Path
) -> None:
    write_model_directory(tmp_path / "out", model=model, tokenizer=None, dtype=dtype)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert load(tmp_path / "out", dtype="auto").dtype == dtype


def test_writing_leaves_the_model_and_its_configuration_alone(model: PreTrainedModel, tmp_path: Path) -> None:
    model.config.dtype = torch.bfloat16
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write_model_directory(tmp_path / "out", model=model, tokenizer=None, dtype=torch.float16)
    assert model.config.dtype == torch.bfloat16
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.dtype == torch.float32


def test_readers_that_look_for_rope_theta_at_the_top_find_it(model: PreTrainedModel, tmp_path: Path) -> None:
    write_model_directory(tmp_path / "out", model=model, tokenizer=None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_modules_that_must_stay_float32_stay_float32(model: PreTrainedModel, tmp_path: Path) -> None:
    model._keep_in_fp32_modules_strict = {"norm"}
    write_model_directory(tmp_path / "out", model=model, tokenizer=None, dtype=torch.bfloat16)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["model.norm.weight"].dtype == torch.float32
    assert written["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_a_compiled_model_is_unwrapped(model: PreTrainedModel, tmp_path: Path) -> None:
    write_model_directory(tmp_path / "out", model=torch.compile(model, backend="eager"), tokenizer=None)
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_a_data_parallel_model_and_its_prefixed_names_are_unwrapped(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    wrapped = nn.DataParallel(model)  # without a GPU only a wrapper, with the names that DDP has as well
    weights = wrapped.state_dict()
    assert all(name.startswith("module.") for name in weights)
    write_model_directory(tmp_path / "own", model=wrapped, tokenizer=None)
    write_model_directory(tmp_path / "given", model=wrapped, tokenizer=None, state_dict=weights)
    for name in ("own", "given"):
        assert torch.equal(logits(load(tmp_path / name)), logits(model))


@pytest.fixture
def adapted(model: PreTrainedModel) -> Any:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # zero at first, so that the adapter does nothing
            nn.init.normal_(parameter, std=0.5)
    return wrapped


def test_lora_adapters_are_merged_and_the_model_keeps_them_apart(adapted: Any, tmp_path: Path) -> None:
    base_before = plain_state_dict(tiny_model("llama", dtype=torch.float32))
    write_model_directory(tmp_path / "out", model=adapted, tokenizer=None)
    merged = load(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-4)
    with adapted.disable_adapter():
        assert not torch.allclose(logits(merged), logits(adapted), atol=1e-2)
    kept = adapted.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    assert torch.equal(kept, base_before["model.layers.0.mlp.up_proj.weight"])


def test_adapters_that_cannot_be_merged_by_adding_are_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    dora = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True))
    with pytest.raises(CheckpointError, match="DoRA"):
        write_model_directory(tmp_path / "out", model=dora, tokenizer=None)


def test_a_missing_an_unknown_and_a_misshapen_weight_are_refused(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    good = dict(model.state_dict())
    name = "model.layers.1.mlp.up_proj.weight"
    cases = {
        "are missing": {key: value for key, value in good.items() if key != name},
        "not part of": good | {"surprise.weight": torch.zeros(1)},
        "has shape": good | {name: torch.zeros(3, 3)},
    }
    for complaint, weights in cases.items():
        with pytest.raises(CheckpointError, match=complaint):
            write_model_directory(tmp_path / "out", model=model, tokenizer=None, state_dict=weights)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_only_replaced_when_asked(model: PreTrainedModel, tmp_path: Path) -> None:
    write_model_directory(tmp_path / "out", model=model, tokenizer=None)
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0)
    with pytest.raises(CheckpointError, match="exists already"):
        write_model_directory(tmp_path / "out", model=model, tokenizer=None)
    assert not torch.equal(logits(load(tmp_path / "out")), logits(model))
    write_model_directory(tmp_path / "out", model=model, tokenizer=None, replace=True)
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_while_writing_leaves_nothing_behind(model: PreTrainedModel, tmp_path: Path) -> None:
    class BrokenTokenizer:
        def save_pretrained(self, directory: Path) -> None:
            raise OSError(f"no space left for {directory}")

    with pytest.raises(CheckpointError, match="no space left"):
        write_model_directory(tmp_path / "out", model=model, tokenizer=BrokenTokenizer())
    assert list(tmp_path.iterdir()) == []


# For every moment a child is forked, which kills itself at its n-th file system call.
KILLED_CHILDREN = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from tests.trainer.models import tiny_model
from trainer.model_directory import write_model_directory

torch.set_num_threads(1)
root, replace = Path(sys.argv[1]), sys.argv[2] == "replace"
model = tiny_model("llama", dtype=torch.float32)
write_model_directory(root / "out", model=model, tokenizer=None)  # also imports what writing needs
with torch.no_grad():
    model.model.norm.weight.mul_(2.0)

def watch(moment):
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "os.listdir", "os.scandir"):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

for moment in range(1, 200):
    if not replace:
        shutil.rmtree(root / "out", ignore_errors=True)
    child = os.fork()
    if child == 0:
        watch(moment)
        write_model_directory(root / "out", model=model, tokenizer=None, replace=replace)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    files = sorted(os.listdir(root / "out")) if (root / "out").exists() else None
    print(moment, status, ",".join(files) if files is not None else "absent", flush=True)
    if status == 0:
        break
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("mode", ["new", "replace"])
def test_a_process_killed_at_any_moment_leaves_a_whole_directory_or_none(mode: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", KILLED_CHILDREN, str(tmp_path), mode],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stderr
    *killed, finished = [line.split(maxsplit=2) for line in result.stdout.splitlines()]
    assert finished[1] == "0"
    assert len(killed) > 10
    assert {status for _, status, _ in killed} == {str(int(signal.SIGKILL))}
    assert {files for _, _, files in killed} <= {finished[2], "absent"}
    assert "model.safetensors" in finished[2]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # the next writer has cleaned up
    assert load(tmp_path / "out").model.norm.weight.mean().item() == pytest.approx(2.0)

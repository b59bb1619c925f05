"""Optimizer states of 8 bits and bfloat16 weights: exact to resume, small, and proven when published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.compose import ROOT
from tests.conftest import RunningInferenceServer
from tests.trainer.batches import make_bodies
from tests.trainer.runs import assert_equal_tensors, rows, run
from tests.trainer.test_sharding import run_in_processes
from trainer.config import load_config
from trainer.errors import ConfigurationError
from trainer.model.sharding import Spread

EIGHT_BIT = ("--optimizer.states", "8bit")
BFLOAT16 = ("--model.dtype", "bfloat16")
LORA = ("--model.lora.rank", "32", "--loss.reference", "base", "--loss.kl_coefficient", "0.1")
LAST = "checkpoints/step-000004"


@pytest.fixture(autouse=True)
def _eagerly(torchao: None) -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def go_on(model: Path, output: Path, of: Path, *options: str) -> None:
    shutil.copytree(of / "checkpoints/step-000002", output / "checkpoints/step-000002")
    run(model, output, make_bodies(4)[2:], *options)


@pytest.mark.parametrize(
    "options",
    [EIGHT_BIT, BFLOAT16, (*BFLOAT16, *EIGHT_BIT), (*BFLOAT16, *EIGHT_BIT, *LORA)],
    ids=["8bit", "bfloat16", "both", "lora"],
)
def test_a_resumed_run_ends_with_the_same_bits(
    tiny_model_directory: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    run(tiny_model_directory, tmp_path / "whole", make_bodies(4), *options)
    go_on(tiny_model_directory, tmp_path / "resumed", tmp_path / "whole", *options)
    for file in ("optimizer.safetensors", "model/model.safetensors"):
        assert (tmp_path / "resumed" / LAST / file).read_bytes() == (
            tmp_path / "whole" / LAST / file
        ).read_bytes()
    moments = load_file(tmp_path / "whole" / LAST / "optimizer.safetensors")
    in_8_bit = [name for name, tensor in moments.items() if tensor.dtype == torch.uint8]
    assert bool(in_8_bit) == ("8bit" in options)
    assert {tensor.dtype for tensor in moments.values()} <= {torch.float32, torch.uint8}
    trained = load_file(tmp_path / "whole" / LAST / "model/model.safetensors")
    rounded = {name: tensor.bfloat16().float() for name, tensor in trained.items()}
    if "bfloat16" in options and options[-1] != LORA[-1]:  # adapters are merged in float32
        assert_equal_tensors(trained, rounded)
    base = load_file(tiny_model_directory / "model.safetensors")
    assert any(not torch.equal(base[name].bfloat16(), trained[name].bfloat16()) for name in base)


def test_states_of_either_kind_are_read_by_a_run_of_the_other(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    kinds = {"float32": (), "8bit": EIGHT_BIT}
    for kind, options in kinds.items():
        run(tiny_model_directory, tmp_path / kind, make_bodies(4), *options)
    with pytest.raises(ConfigurationError, match=r'optimizer\.states: "float32" in the checkpoint, "8bit"'):
        go_on(tiny_model_directory, tmp_path / "refused", tmp_path / "float32", *EIGHT_BIT)
    for first, then in (("float32", "8bit"), ("8bit", "float32")):
        output = tmp_path / f"{first}-{then}"
        changed = (*kinds[then], "--train.resume_changes", "optimizer.states")
        go_on(tiny_model_directory, output, tmp_path / first, *changed)
        found = load_file(output / LAST / "model/model.safetensors")
        for name, tensor in load_file(tmp_path / "float32" / LAST / "model/model.safetensors").items():
            # Each of the four steps moves a weight by 1e-3 at most.
            assert float((found[name] - tensor).abs().mean()) < 2e-4, (output, name)


def test_steps_below_half_of_what_bfloat16_tells_apart_add_up() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.ones(64, 256, dtype=torch.bfloat16))
    from trainer.model.small_adamw import SmallAdamW

    optimizer = SmallAdamW([weight], eight_bit=True, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert set(weight.detach().unique().tolist()) > {1.0}  # the spacing below 1 is 0.0039
    assert float(weight.detach().float().mean()) == pytest.approx(1 - 20 * 1e-4, abs=2e-4)


def reward_after_training(optimizer: torch.optim.Optimizer, logits: nn.Parameter) -> float:
    """Follow the exact gradient of the expected reward: at each position one of 256 choices is right."""
    right = torch.arange(len(logits))
    for _ in range(100):
        probabilities = logits.float().softmax(-1)[right, right]
        optimizer.zero_grad()
        (-probabilities.log().mean()).backward()
        optimizer.step()
    return float(logits.detach().float().softmax(-1)[right, right].mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eight_bit", [False, True])
def test_a_bandit_is_learned_as_well_as_in_float32(dtype: torch.dtype, eight_bit: bool) -> None:
    from trainer.model.small_adamw import SmallAdamW

    torch.manual_seed(0)
    options = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    plain, small = (nn.Parameter(torch.zeros(16, 256, dtype=each)) for each in (torch.float32, dtype))
    expected = reward_after_training(torch.optim.AdamW([plain], **options), plain)
    found = reward_after_training(SmallAdamW([small], eight_bit=eight_bit, **options), small)
    assert expected > 0.9
    assert found > expected - 0.05


def test_the_demos_task_was_learned_to_five_points_of_float32_and_the_page_says_so() -> None:
    kinds = json.loads((ROOT / "benchmarks/results/states.json").read_text())["kinds"]
    page = (ROOT / "docs/fewer-bytes.md").read_text()
    assert len(kinds) == 4
    for kind in kinds.values():
        assert kind["heldout_after"] > kinds["float32"]["heldout_after"] - 0.05
        assert kind["publishes_proven"] == kind["publishes"]
        assert f"| {kind['heldout_after']:.1%} | {kind['optimizer_bytes'] / 1e6:,.0f} MB |" in page


def test_copies_of_a_weight_are_rounded_alike_and_parts_each_in_their_own_way() -> None:
    assert [Spread(copies=2, rank=rank).part for rank in range(2)] == [0, 0]
    assert [Spread(copies=2, parts=2, rank=rank).part for rank in range(4)] == [0, 1, 0, 1]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.config._tree._is_installed", lambda package: package != "torchao")
    for options, setting in ((EIGHT_BIT, r"optimizer\.states 8bit"), (BFLOAT16, r"model\.dtype bfloat16")):
        with pytest.raises(ConfigurationError, match=f"{setting}.* needs the package torchao: pip install"):
            load_config(None, ["--model.path", "m", *options], environment={})
    frozen = (*BFLOAT16, "--model.lora.rank", "4")
    assert load_config(None, ["--model.path", "m", *frozen], environment={}).model.dtype == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("options", [BFLOAT16, (*BFLOAT16, *LORA)], ids=["full", "lora"])
def test_publishes_of_bfloat16_weights_are_proven_as_closely_as_float32_ones(
    inference_server: RunningInferenceServer, tmp_path: Path, options: tuple[str, ...]
) -> None:
    published = ("--publish.transport", "disk", "--publish.servers", inference_server.url)
    run(inference_server.model_directory, tmp_path, make_bodies(4), *options, *published)
    reports = rows(tmp_path, "publish")
    assert [row["publish_version"] for row in reports] == [0, 1, 2, 3, 4]
    assert all(row["publish_mean_difference"] < 1e-5 for row in reports)


@pytest.mark.slow
def test_spread_over_two_processes_a_run_goes_on_with_the_same_bits_and_in_one(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    def plan(name: str, *options: str, steps: int = 1, resumed: bool = False) -> dict[str, Any]:
        return {
            "model": str(tiny_model_directory),
            "output": str(tmp_path / name),
            "options": [*BFLOAT16, *options],
            "steps": steps,
            "resumed_from": str(tmp_path / "whole/checkpoints/step-000002") if resumed else None,
            "first": 2 if resumed else 0,
        }

    both = (*EIGHT_BIT, "--parallel.mode", "sharded")
    run_in_processes(
        2,
        [
            plan("whole", *both, steps=4),
            plan("resumed", *both, steps=4, resumed=True),
            plan("lora", *both, *LORA),
            plan("gathered", "--parallel.mode", "gathered"),
            plan("copies"),
        ],
        tmp_path / "log",
    )
    go_on(tiny_model_directory, tmp_path / "one", tmp_path / "whole", *BFLOAT16, *EIGHT_BIT)
    for file in ("optimizer.safetensors", "model/model.safetensors"):
        assert (tmp_path / "resumed" / LAST / file).read_bytes() == (
            tmp_path / "whole" / LAST / file
        ).read_bytes()
    kinds = [tensor.dtype for tensor in load_file(tmp_path / "one" / LAST / "optimizer.safetensors").values()]
    whole = load_file(tmp_path / "whole" / LAST / "optimizer.safetensors")
    assert kinds.count(torch.uint8) == [tensor.dtype for tensor in whole.values()].count(torch.uint8) > 0
    # The first gradients, which are the first moments but for a factor, to what computing in bfloat16 costs:
    # without one process's share they would be off by half.
    run(tiny_model_directory, tmp_path / "float32", make_bodies(1), steps=1)
    file = "checkpoints/step-000001/optimizer.safetensors"
    expected = load_file(tmp_path / "float32" / file)
    largest = max(float(each.abs().max()) for name, each in expected.items() if name.endswith("/exp_avg"))
    for name in ("gathered", "copies"):
        found = load_file(tmp_path / name / file)
        off = [found[each] - tensor for each, tensor in expected.items() if each.endswith("/exp_avg")]
        assert max(float(each.abs().max()) for each in off) < 0.1 * largest

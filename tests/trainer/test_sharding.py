"""Weights spread over processes: the gradients, the weights and the checkpoints that one process makes."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from inference_plugins.atropos_delta import SOURCE
from tests.conftest import RunningInferenceServer
from tests.forked import forked_ranks
from tests.ports import free_port
from tests.trainer.batches import VOCABULARY, make_bodies
from tests.trainer.inference_stand_in import serving
from tests.trainer.runs import assert_equal_tensors, rows, run
from tests.trainer.test_publish_delta_transport import DeltaServer
from tests.trainer.test_publish_lora import AdapterStandIn
from trainer.config import ParallelSettings
from trainer.errors import ConfigurationError
from trainer.model.base_checkpoint import read_base
from trainer.model.sharding import plan_spread
from trainer.model.weight_stream import WeightStream
from trainer.publish.delta.files import Label, delta_name, whole_name, write_file
from trainer.publish.delta.snapshot import Snapshot
from trainer.publish.delta.update import Update

_COMMON = ["--data.tokens_per_micro_batch", "40", "--checkpoint.every", "1", "--checkpoint.keep", "9"]
# Where a gradient is nearly zero AdamW divides its last bits by as little.
_COMMON += ["--optimizer.epsilon", "1e-3"]
_LORA = ["--model.lora.rank", "4", "--optimizer.learning_rate", "3e-3"]
_SCORED = ["--loss.name", "ppo_clip", "--loss.reference", "base", "--loss.kl_coefficient", "0.1"]
_SCORED += ["--loss.top_entropy_share", "0.4"]
_STEPS = 4


@pytest.fixture(scope="module")
def untied(tiny_model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 whose head is not its embedding, in several files, with the tiny model's tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "untied"
    shutil.copytree(tiny_model_directory, directory, ignore=shutil.ignore_patterns("model.safetensors"))
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=50,  # which 3 and 4 do not divide
            intermediate_size=70,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            initializer_range=0.2,
        )
    )
    model.save_pretrained(directory, max_shard_size="80KB")
    assert len(list(directory.glob("*.safetensors"))) >= 4, "so that each process writes some of them"
    return directory


@pytest.fixture(scope="module")
def experts(tiny_model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral that sends each token to one of four experts, with the tiny model's tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "experts"
    shutil.copytree(tiny_model_directory, directory)
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            num_local_experts=4,
            num_experts_per_tok=1,
            initializer_range=0.2,
        )
    )
    model.save_pretrained(directory)
    return directory


def run_in_processes(count: int, runs: list[dict[str, Any]], log: Path) -> None:
    plan = log.with_suffix(".json")
    plan.write_text(json.dumps([each | {"port": free_port()} for each in runs]))
    ranks = forked_ranks(count, 0, "tests.trainer.several_runs", [plan], stdout=log, stderr=log)
    try:
        assert [rank.wait(200) for rank in ranks] == [0] * count, log.read_text()[-5000:]
    except subprocess.TimeoutExpired as error:
        raise AssertionError(log.read_text()[-5000:]) from error
    finally:
        for rank in ranks:
            rank.kill()


def tensors_in(path: Path) -> dict[str, Tensor]:
    """Of a file, or of all files of a model's directory."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_alike(ours: Path, theirs: Path, ending: str) -> None:
    """Each tensor whose name ends so: to 1e-6 of the largest entry of them all."""
    found, expected = tensors_in(ours), tensors_in(theirs)
    assert found.keys() == expected.keys()
    compared = {name: tensor for name, tensor in expected.items() if name.endswith(ending)}
    largest = max(float(tensor.abs().max()) for tensor in compared.values())
    off = {name: float((found[name] - tensor).abs().max()) / largest for name, tensor in compared.items()}
    worst = max(off, key=lambda name: off[name])
    assert off[worst] <= 1e-6, (ours, worst, off[worst])


def assert_trained_alike(ours: Path, theirs: Path) -> None:
    """The first step's gradients, which are its first moments but for a factor; the weights at the end."""
    for step, file, ending in (
        (1, "optimizer.safetensors", "/exp_avg"),
        (_STEPS, "model", ""),
    ):
        path = f"checkpoints/step-{step:06d}/{file}"
        assert_alike(ours / path, theirs / path, ending)


def assert_told_alike(ours: Path, theirs: Path) -> None:
    """What is summed over the tokens of the step counts each of them once."""
    found, expected = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (ours, theirs)
    )
    assert len(found) == len(expected) == _STEPS
    for row, one in zip(found, expected, strict=True):
        for name in ("loss", "grad_norm", "entropy", "mismatch_tokens", "mismatch_kl"):
            assert row[name] == pytest.approx(one[name], rel=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "cases"),
    [
        (
            2,
            {
                "tied": ["--parallel.mode", "sharded"],
                "untied": ["--parallel.mode", "gathered", "--model.gradient_checkpointing", "true"],
                "lora-tied": ["--parallel.mode", "sharded", *_LORA],
                "copies-untied": [],
                # Whole weights, and each micro-batch split; there is one head of keys for two processes.
                "split-untied": ["--parallel.sequence", "2", *_SCORED],
            },
        ),
        (
            3,
            {
                "untied": ["--parallel.mode", "sharded", "--model.gradient_checkpointing", "true"],
                # Passes without gradient, with adapters off and on, before the step is computed.
                "lora-untied": ["--parallel.mode", "gathered", *_LORA, *_SCORED],
            },
        ),
        (
            4,
            {
                "untied": ["--parallel.mode", "sharded", "--parallel.shard", "2"],
                "split-untied": ["--parallel.mode", "sharded", "--parallel.sequence", "2"],
                # The reference is a second model, spread as well.
                "tied": ["--parallel.mode", "gathered", "--parallel.replicate", "2", *_SCORED],
            },
        ),
    ],
)
def test_spread_over_processes_a_run_computes_what_one_process_does(
    count: int,
    cases: dict[str, list[str]],
    tiny_model_directory: Path,
    untied: Path,
    tmp_path: Path,
) -> None:
    models = {"tied": tiny_model_directory, "untied": untied}
    runs = [
        {
            "model": str(models[name.rpartition("-")[2]]),
            "output": str(tmp_path / f"ours-{name}"),
            "options": [*_COMMON, *options],
            "steps": _STEPS,
        }
        for name, options in cases.items()
    ]
    run_in_processes(count, runs, tmp_path / "ours.log")
    for name, options in cases.items():
        model = models[name.rpartition("-")[2]]
        run(model, tmp_path / name, make_bodies(_STEPS), *_COMMON, *_without_parallel(options), steps=_STEPS)
        assert_trained_alike(tmp_path / f"ours-{name}", tmp_path / name)
        assert_told_alike(tmp_path / f"ours-{name}", tmp_path / name)
        AutoModelForCausalLM.from_pretrained(tmp_path / f"ours-{name}/checkpoints/step-000004/model")


@pytest.mark.slow
def test_any_number_of_processes_goes_on_from_a_checkpoint_of_any_other(
    tiny_model_directory: Path, untied: Path, tmp_path: Path
) -> None:
    def plan(name: str, *options: str, resumed_from: str = "", steps: int = _STEPS) -> dict[str, Any]:
        return {
            "model": str(untied),
            "output": str(tmp_path / name),
            "options": [*_COMMON, *options],
            "steps": steps,
            "resumed_from": str(tmp_path / resumed_from / "checkpoints/step-000002")
            if resumed_from
            else None,
            "first": 2 if resumed_from else 0,
        }

    sharded, gathered = ("--parallel.mode", "sharded"), ("--parallel.mode", "gathered")
    run(untied, tmp_path / "one", make_bodies(_STEPS), *_COMMON, steps=_STEPS)
    two = [plan("two", *sharded), plan("again", *sharded, resumed_from="two")]
    two.append(plan("one-two", *gathered, resumed_from="one"))
    run_in_processes(2, two, tmp_path / "2.log")
    three = [
        plan("three", *sharded, steps=0),
        plan("two-three", *sharded, resumed_from="two"),
        plan("two-copies", resumed_from="two"),
    ]
    run_in_processes(3, three, tmp_path / "3.log")
    shutil.copytree(tmp_path / "two/checkpoints/step-000002", tmp_path / "two-one/checkpoints/step-000002")
    run(untied, tmp_path / "two-one", make_bodies(_STEPS)[2:], *_COMMON, steps=_STEPS)

    last = f"checkpoints/step-{_STEPS:06d}"
    assert contents(tmp_path / "again" / last) == contents(tmp_path / "two" / last)
    for name in ("one-two", "two-three", "two-copies", "two-one"):
        assert_alike(
            tmp_path / name / last / "model",
            tmp_path / "one" / last / "model",
            "",
        )
    # Whoever writes it: the same files, and the same bytes where the same numbers are in them.
    first = "checkpoints/step-000000"
    for name in ("two", "three"):
        assert contents(tmp_path / name / first) == contents(tmp_path / "one" / first)


@pytest.mark.slow
def test_what_one_process_cannot_write_fails_on_all(tiny_model_directory: Path, tmp_path: Path) -> None:
    runs = [
        {
            "model": str(tiny_model_directory),
            "output": str(tmp_path / "run"),
            "options": ["--parallel.mode", "sharded"],
            "steps": 2,
            "rank_1_writes_at_most": 100_000,
        }
    ]
    run_in_processes(2, runs, tmp_path / "log")
    assert "could not write its part" in (tmp_path / "run.refused-0").read_text()
    assert "File too large" in (tmp_path / "log").read_text()
    assert "process 0 has ended the run" in (tmp_path / "run.refused-1").read_text()
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000000"]


@pytest.mark.slow
def test_a_checkpoint_that_process_0_fails_to_begin_keeps_nobody_waiting(
    tiny_model_directory: Path, tmp_path: Path, free_port: int
) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    output.mkdir()
    words = [tiny_model_directory, output, 0, "checkpointing", "raise", "--checkpoint.every", "3"]
    words += ["--parallel.mode", "sharded"]
    ranks = forked_ranks(
        2, free_port, "tests.trainer.failing_run", words, stdout=tmp_path / "out", stderr=log
    )
    try:
        assert [rank.wait(60) for rank in ranks] == [1, 1]
    finally:
        for rank in ranks:
            rank.kill()
    assert "unexpected RuntimeError: nothing works" in log.read_text()
    assert (output / "checkpoints/step-000003/manifest.json").exists(), "by all, after the failure"


@pytest.mark.slow
def test_weights_that_are_spread_are_published_and_proven(
    tiny_model_directory: Path,
    start_inference_server: Callable[..., RunningInferenceServer],
    tmp_path: Path,
) -> None:
    """Full ones, copied and written as they come, and those of a base with adapters merged."""
    server = start_inference_server(tiny_model_directory)
    publish = ["--publish.servers", server.url, "--publish.transport"]
    runs = [
        {
            "model": str(tiny_model_directory),
            "output": str(tmp_path / name),
            "options": [*_COMMON, *publish, transport, "--parallel.mode", mode, *options],
            "steps": 2,
        }
        for name, transport, mode, options in (
            ("full", "disk", "sharded", []),
            ("uncopied", "disk", "sharded", ["--publish.overlap", "false"]),
            ("lora", "disk", "gathered", _LORA),
        )
    ]
    run_in_processes(2, runs, tmp_path / "log")
    for name in ("full", "uncopied", "lora"):
        published = rows(tmp_path / name, "publish")
        assert [row["version"] for row in published] == [0, 1, 2]
        assert all(row["publish_verified"] for row in published)
        served = load_file(tmp_path / name / "published/v000002/model.safetensors")
        assert_equal_tensors(served, load_file(tmp_path / name / "final/model.safetensors"))


@pytest.mark.slow
def test_adapters_that_are_spread_are_published_as_one_process_would_and_proven(
    tiny_model_directory: Path,
    start_inference_server: Callable[..., RunningInferenceServer],
    tmp_path: Path,
) -> None:
    """To a server that takes adapters, and merged to one that takes none."""
    taking = AdapterStandIn(AutoModelForCausalLM.from_pretrained(tiny_model_directory))
    plain = start_inference_server(tiny_model_directory)
    steps = 2
    with serving(taking):
        options = [*_COMMON, *_LORA, "--publish.transport", "lora"]
        options += ["--publish.servers", f"[{taking.url}, {plain.url}]"]
        runs = [
            {
                "model": str(tiny_model_directory),
                "output": str(tmp_path / mode),
                "options": [*options, "--parallel.mode", mode],
                "steps": steps,
            }
            for mode in ("sharded", "gathered")
        ]
        run_in_processes(2, runs, tmp_path / "log")
        last = f"checkpoints/step-{steps:06d}"
        for mode in ("sharded", "gathered"):
            shutil.copytree(tmp_path / mode / last, tmp_path / f"{mode}-one" / last)
            # Nothing is left to be trained: what it went on from is published.
            run(tiny_model_directory, tmp_path / f"{mode}-one", [], *options, steps=steps)
    for mode in ("sharded", "gathered"):
        published = rows(tmp_path / mode, "publish")
        assert [row["version"] for row in published] == [0, 1, 2]
        assert all(row["publish_verified"] for row in published)
        assert all(row["publish_servers"] == 2 for row in published)
        (ours,), (one,) = (
            [contents(path) for path in (tmp_path / each / "published").glob("*-v000002")]
            for each in (mode, f"{mode}-one")
        )
        assert ours.keys() == {"adapter_model.safetensors", "adapter_config.json"}
        assert ours == one


@pytest.mark.slow
def test_what_changes_in_weights_that_are_spread_is_published_as_one_process_would(
    tiny_model_directory: Path, experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit, to servers that prove what they hold; one of them refuses a delta, and gets all of it."""
    models = {"tied": tiny_model_directory, "experts": experts}
    servers = {
        name: DeltaServer({each: tensor.clone() for each, tensor in published_weights(model, model)})
        for name, model in models.items()
    }
    for name, server in servers.items():
        server.before["atropos_delta_prepare"] = partial(damaging, tmp_path / name, monkeypatch)
    options = {
        "tied": ["--parallel.mode", "sharded", "--optimizer.learning_rate", "1e-5", "--publish.keep", "9"],
        "experts": ["--parallel.mode", "gathered", "--publish.delta.anchor_every", "3"],
    }
    options["experts"] += ["--publish.keep", "1", "--publish.overlap", "false"]
    kept = {
        "tied": {whole_name(0), *map(delta_name, (1, 2, 3, 4)), whole_name(2)},
        "experts": {whole_name(3), delta_name(4)},  # what the newest version is made of
    }
    publish = [*_COMMON, "--publish.transport", "delta", "--publish.dtype", "bfloat16"]
    publish += ["--publish.verify", "false", "--publish.servers"]
    with serving(*servers.values()):
        runs = [
            {
                "model": str(model),
                "output": str(tmp_path / name),
                "options": [*publish, servers[name].url, *options[name]],
                "steps": _STEPS,
            }
            for name, model in models.items()
        ]
        run_in_processes(2, runs, tmp_path / "log")
    for name, model in models.items():
        assert [row["version"] for row in rows(tmp_path / name, "publish")] == [0, 1, 2, 3, 4]
        checkpoints = [tmp_path / name / f"checkpoints/step-{step:06d}/model" for step in range(_STEPS + 1)]
        assert_equal_tensors(servers[name].model.tensors, dict(published_weights(checkpoints[-1], model)))
        expected = files_of_one_process(checkpoints, model, tmp_path / f"{name}-one")
        found = {path.name: path.read_bytes() for path in (tmp_path / name / "published").iterdir()}
        assert all(content == expected[each] for each, content in found.items())
        assert found.keys() == kept[name]


def published_weights(checkpoint: Path, model: Path) -> Iterator[tuple[str, Tensor]]:
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return WeightStream(loaded, read_base(str(model)), dtype=torch.bfloat16).weights()


def files_of_one_process(checkpoints: list[Path], model: Path, directory: Path) -> dict[str, bytes]:
    """Of each version the delta and all of it."""
    directory.mkdir()
    snapshot, base, result = Snapshot(torch.device("cpu")), Label(version=-1, checksum=""), {}
    for version, checkpoint in enumerate(checkpoints):
        update = Update(snapshot, version, published_weights(checkpoint, model))
        update.sum_up()
        label = Label(version=version, checksum=update.checksum)
        of_changes = replace(label, base_version=base.version, base_checksum=base.checksum)
        layout, base = update.choose(whole=False), label
        all_shapes = {name: each.shape for name, each in update.tensors.items()}
        write_file(directory / "delta", of_changes, update.shapes, layout, update.parts, mode=0o700)
        write_file(directory / "whole", label, all_shapes, update.tensors, update.held(), mode=0o700)
        result[delta_name(version)] = (directory / "delta").read_bytes()
        result[whole_name(version)] = (directory / "whole").read_bytes()
    return result


def damaging(output: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]) -> None:
    """Let a server read this run's files, and find the second delta damaged."""
    monkeypatch.setenv(SOURCE, str(output / "published"))
    if asked["name"] == delta_name(2):
        asked["sha256"] = "0" * 64


def contents(checkpoint: Path) -> dict[str, bytes]:
    """Every file but the manifest, which holds the configuration."""
    return {
        str(path.relative_to(checkpoint)): path.read_bytes()
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


@pytest.mark.slow
def test_in_bfloat16_as_with_copies_and_with_experts_as_in_one_process(
    tiny_model_directory: Path, experts: Path, tmp_path: Path
) -> None:
    """bfloat16 rounds what one process packs otherwise than two do, so two are compared with two.

    Experts are single tensors in memory and many in the checkpoint, and some get no token on a process.
    """
    sharded, bfloat16 = ["--parallel.mode", "sharded"], ["--train.mixed_precision", "bf16"]
    cases = {
        "ours": (tiny_model_directory, [*sharded, *bfloat16]),
        "copies": (tiny_model_directory, bfloat16),
        "experts": (experts, sharded),
    }
    runs = [
        {
            "model": str(model),
            "output": str(tmp_path / name),
            "options": [*_COMMON, *options],
            "steps": _STEPS,
        }
        for name, (model, options) in cases.items()
    ]
    run_in_processes(2, runs, tmp_path / "log")
    assert_trained_alike(tmp_path / "ours", tmp_path / "copies")
    run(experts, tmp_path / "one", make_bodies(_STEPS), *_COMMON, steps=_STEPS)
    assert_trained_alike(tmp_path / "experts", tmp_path / "one")


def _without_parallel(options: list[str]) -> list[str]:
    pairs = list(zip(options[::2], options[1::2], strict=True))
    return [word for pair in pairs if not pair[0].startswith("--parallel") for word in pair]


def test_another_number_of_processes_and_modes_that_cannot_be_are_refused(
    tiny_model_directory: Path, tmp_path: Path
) -> None:
    for options, message in (
        (["--parallel.processes", "4"], "parallel.processes is 4, but 1 train together"),
        (["--parallel.shard", "2"], "set parallel.mode to 'sharded'"),
        (["--parallel.mode", "sharded", "--parallel.shard", "2"], "has to be the number of processes, 1"),
        (["--parallel.sequence", "2"], "which does not divide the 1 processes"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            run(tiny_model_directory, tmp_path / "run", make_bodies(1), *options, steps=1)
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_torch_that_leaves_out_gradients_of_unused_parameters_is_refused_for_spread_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(FSDPModule, "set_reduce_scatter_unused_params")
    assert plan_spread(ParallelSettings(), 2) == (2, 1)
    with pytest.raises(ConfigurationError, match=r"sharded needs torch 2\.13 or newer, and this is"):
        plan_spread(ParallelSettings(mode="sharded"), 2)

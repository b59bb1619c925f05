"""What verl exports is written as the base is; a proof by its engine tells new weights from old ones."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl.workers.engine_workers import TrainingWorker

from tests.conftest import RunningInferenceServer
from tests.verl.engines import config_for, make_worker
from trainer.errors import CheckpointError
from trainer.publish import VerificationFailed, make_probes, score_with_model
from verl_integration.publishing import DirectoryCheckpointEngine, LoadedByVerl, make_publisher, score_by_verl

StartServer = Callable[..., RunningInferenceServer]


class Workers:
    """Verl's group of workers, with the one that lives in this process."""

    def __init__(self, worker: TrainingWorker) -> None:
        self.worker = worker

    def compute_log_prob(self, rows: Any) -> Any:
        return self.worker.infer_batch(rows)


@pytest.fixture
def worker(tiny_model_directory: Path) -> TrainingWorker:
    made = make_worker(tiny_model_directory)
    made.reset()
    return made


def change(worker: TrainingWorker) -> None:
    """Train, in effect."""
    with torch.no_grad():
        for parameter in worker.engine.module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


def exported(worker: TrainingWorker) -> Iterator[tuple[str, Tensor]]:
    weights: Iterator[tuple[str, Tensor]] = worker.engine.get_per_tensor_param()[0]
    return weights


def send(model: Path, directory: Path, weights: Iterator[tuple[str, Tensor]], **options: Any) -> None:
    arguments = {"directory": str(directory), "model_path": str(model), "dtype": "float32", "mode": 0o700}
    engine = DirectoryCheckpointEngine(1 << 20, True, **(arguments | options))
    asyncio.run(engine.send_weights(weights, global_steps=1))


def test_what_verl_exports_is_written_as_the_base_is(
    worker: TrainingWorker, tiny_model_directory: Path, tmp_path: Path
) -> None:
    change(worker)
    weights = [(name, tensor.clone()) for name, tensor in exported(worker)]
    head = dict(weights)["model.embed_tokens.weight"]
    send(tiny_model_directory, tmp_path / "w", iter([*weights, ("another.name.of.it", head)]))
    written = load_file(tmp_path / "w" / "export" / "model.safetensors")
    base = load_file(tiny_model_directory / "model.safetensors")
    assert {name: tensor.shape for name, tensor in written.items()} == {
        name: tensor.shape for name, tensor in base.items()
    }
    assert all(torch.equal(tensor, dict(weights)[name]) for name, tensor in written.items())
    assert not any(torch.equal(tensor, base[name]) for name, tensor in written.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "w" / "export").encode("a")
    assert stat.S_IMODE((tmp_path / "w" / "export").stat().st_mode) == 0o700


def test_weights_that_are_missing_are_an_error_and_the_other_ranks_are_not_kept_waiting(
    worker: TrainingWorker, tiny_model_directory: Path, tmp_path: Path
) -> None:
    weights = dict(exported(worker))
    weights["model.norm.weight"] = torch.zeros(3)
    stream = iter(weights.items())
    with pytest.raises(CheckpointError, match=r"model.norm.weight as \[3\]"):
        send(tiny_model_directory, tmp_path / "w", stream)
    assert next(stream, None) is None
    del weights["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"does not export model.norm.weight"):
        send(tiny_model_directory, tmp_path / "w", iter(weights.items()))
    assert not (tmp_path / "w" / "export").exists()


def test_verls_engine_scores_the_probes_as_the_model_does(
    worker: TrainingWorker, tiny_model_directory: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_directory, dtype=torch.float32)
    probes = make_probes(AutoTokenizer.from_pretrained(tiny_model_directory))
    scores = score_by_verl(Workers(worker), probes, ranks=4)
    expected = score_with_model(model, probes.texts, "cpu")
    assert len(scores.texts) == len(probes.texts)
    for ours, theirs in zip(scores.texts, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_servers_of_verl_are_proven_and_one_with_old_weights_is_found_out(
    worker: TrainingWorker,
    tiny_model_directory: Path,
    tmp_path: Path,
    start_inference_server: StartServer,
) -> None:
    server = start_inference_server(tiny_model_directory)
    updates: list[int] = []
    publisher = make_publisher(
        config_for(tiny_model_directory, tmp_path, "--publish.on_failure", "abort"),
        Workers(worker),
        AutoTokenizer.from_pretrained(tiny_model_directory),
        ranks=1,
        started=LoadedByVerl([server.url.removeprefix("http://")], updates.append),
    )
    assert publisher is not None
    with publisher:
        assert publisher.start(0).verified
        assert updates == [0]
        change(worker)  # and verl's update, which here does nothing, did not arrive
        with pytest.raises(VerificationFailed):
            publisher.publish(1)
    assert LoadedByVerl.pauses is False

"""The arithmetic of the largest model: its bytes a parameter are those of a run, on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.largest_model import KINDS, bytes_per_parameter, largest, needed
from local_stack.models import make_tiny_model
from trainer.config import load_config
from trainer.run.train_state import prepare_run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "wide", hidden_size=256)


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("kind", KINDS)
def test_weights_gradients_and_states_take_the_bytes_that_are_counted(
    kind: str, model: Path, tmp_path: Path
) -> None:
    dtype, states = KINDS[kind]
    words = ["--model.path", str(model), "--train.output_dir", str(tmp_path), "--train.device", "cpu"]
    words += ["--train.mixed_precision", "no"]
    config = load_config(None, [*words, "--model.dtype", dtype, "--optimizer.states", states], environment={})
    prepared = prepare_run(config)
    parameters = list(prepared.policy.model.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with torch.compiler.set_stance("force_eager"):
        prepared.optimizer.step()
    prepared.joined.release()
    tensors = parameters + [parameter.grad for parameter in parameters if parameter.grad is not None]
    for state in prepared.optimizer.state.values():
        for moment in state.values():
            tensors += [moment.codes, moment.scale] if hasattr(moment, "codes") else [moment]
    count = sum(parameter.numel() for parameter in parameters)
    found = sum(tensor.nbytes for tensor in tensors) / count
    assert found == pytest.approx(bytes_per_parameter(dtype, states), rel=0.02)


@pytest.mark.parametrize("processes", [1, 8])
def test_what_is_largest_needs_all_of_the_memory(processes: int) -> None:
    def need(count: float) -> float:
        return needed(count, "float32", "8bit", processes=processes)

    assert need(largest(need, 80e9)) == pytest.approx(80e9, rel=1e-6)


def test_eight_billion_parameters_in_float32_take_little_more_than_their_states() -> None:
    eight_billion = needed(8e9, "float32", "float32")
    assert 16 * 8e9 < eight_billion < 1.3 * 16 * 8e9

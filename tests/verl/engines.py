"""One step of verl's FSDP2 engine on the CPU, and the same step of our own trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import verl.utils.tensordict_utils as tu
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.config import CheckpointConfig
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine_workers import TrainingWorker, TrainingWorkerConfig

from atropos_client import parse_batch
from tests.verl.numbers import FLOAT32, LEARNING_RATE
from trainer import load_config
from trainer.config import TrainerConfig
from trainer.model.wrappers import weights_by_name
from trainer.run.optimizer_step import StepRunner
from trainer.run.train_state import prepare_run


@dataclass(frozen=True)
class Step:
    """What one optimizer step computed."""

    loss: float
    grad_norm: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def config_for(model: Path, output: Path, *settings: str) -> TrainerConfig:
    return load_config(
        None,
        [
            *("--model.path", str(model), "--train.output_dir", str(output)),
            *("--train.device", "cpu", "--train.mixed_precision", "no", "--train.steps", "10"),
            *("--optimizer.learning_rate", str(LEARNING_RATE), "--data.tokens_per_micro_batch", "64"),
            *settings,
        ],
        environment={},
    )


def our_step(config: TrainerConfig, body: bytes) -> Step:
    """Compute a step with our trainer."""
    prepared = prepare_run(config)
    try:
        steps = StepRunner(config, prepared)
        micro_batches = steps.prepare(parse_batch(body)).micro_batches
        steps.accumulate(steps.share_out(micro_batches)[0])
        model = prepared.policy.model
        gradients = {
            name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None
        }
        result = steps.train_on(micro_batches)
        weights = {name: each.detach().clone() for name, each in weights_by_name(model).items()}
    finally:
        prepared.joined.release()
    return Step(result.loss, result.grad_norm, gradients, weights)


def make_worker(model: Path) -> TrainingWorker:
    """Verl's worker with an FSDP2 engine in float32; `reset` loads the weights."""
    return TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=HFModelConfig(
                path=str(model),
                enable_gradient_checkpointing=False,
                use_remove_padding=False,
                override_config={"attn_implementation": "sdpa"},
            ),
            engine_config=FSDPEngineConfig(
                strategy="fsdp2",
                use_torch_compile=False,
                use_dynamic_bsz=True,
                max_token_len_per_gpu=64,
                infer_max_token_len_per_gpu=64,
                mixed_precision=FLOAT32,
            ),
            optimizer_config=FSDPOptimizerConfig(
                lr=LEARNING_RATE, clip_grad=1.0, weight_decay=0.0, betas=(0.9, 0.95), total_training_steps=10
            ),
            checkpoint_config=CheckpointConfig(),
        )
    )


def verl_step(worker: TrainingWorker, loss: Any, rows: TensorDict, info: dict[str, Any]) -> Step:
    """Compute a step with verl's engine, from the model's own weights."""
    worker.reset()
    worker.set_loss_fn(loss)
    for name, value in info.items():
        tu.assign_non_tensor_data(rows, name, value)
    engine, gradients = worker.engine, {}
    optimizer_step = engine.optimizer_step

    def note_gradients() -> Any:
        parameters = engine.module.named_parameters()
        gradients.update({name: each.grad.full_tensor().clone() for name, each in parameters})
        return optimizer_step()

    engine.optimizer_step = note_gradients
    metrics = tu.get(worker.train_mini_batch(rows), "metrics")
    weights = {name: each.full_tensor() for name, each in engine.module.state_dict().items()}
    return Step(metrics["loss"][0], metrics["grad_norm"][0], gradients, weights)


def assert_equal_steps(ours: Step, theirs: Step) -> None:
    assert abs(ours.loss - theirs.loss) <= 1e-6 * max(1.0, abs(ours.loss))
    assert abs(ours.grad_norm - theirs.grad_norm) <= 1e-5 * ours.grad_norm
    largest = max(float(each.abs().max()) for each in ours.gradients.values())
    assert largest > 0
    _assert_close(ours.gradients, theirs.gradients, 5e-6 * largest)
    _assert_close(ours.weights, theirs.weights, 1e-4)


def _assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() <= theirs.keys()
    differences = {name: float((each - theirs[name]).abs().max()) for name, each in ours.items()}
    assert max(differences.values()) <= tolerance, differences


def options(settings: Sequence[str]) -> list[str]:
    """`["name=gspo"]` as words of our command line."""
    return [
        word for each in settings for word in (f"--loss.{each.partition('=')[0]}", each.partition("=")[2])
    ]

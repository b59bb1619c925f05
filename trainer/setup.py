"""Putting a run together: Accelerate, the policy, the optimizer, and the state they start from."""

from __future__ import annotations

import importlib.metadata
import logging
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast, set_seed
from torch import nn

from atropos_client.private_files import PRIVATE_DIRECTORY, make_run_directory
from trainer.advantages import AdvantageNormalizer
from trainer.checkpoint import (
    Checkpoint,
    RunState,
    read_checkpoint,
    restore_optimizer,
    restore_random_states,
    trained_parameter_names,
)
from trainer.checkpoint_store import (
    checkpoint_path,
    list_checkpoints,
    newest_whole_checkpoint,
    recover_checkpoints,
)
from trainer.config import OptimizerSettings, TrainerConfig
from trainer.errors import CheckpointError, ConfigurationError
from trainer.head import Head
from trainer.head_choice import choose_head
from trainer.model import Policy, choose_mixed_precision, load_policy
from trainer.packing import Packing
from trainer.packing_choice import choose_packing
from trainer.step import StepRunner

logger = logging.getLogger(__name__)

# Processes wait for process 0 while it publishes, which may take as long as its deadlines add up to.
_PROCESS_GROUP_TIMEOUT = timedelta(hours=2)

# What process 0 tells the others instead of a checkpoint's step.
_NONE, _FAILED = -1, -2


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that is ready for its first step."""

    accelerator: Accelerator
    policy: Policy
    """Its `model` is the unwrapped one."""
    model: nn.Module
    """As Accelerate wrapped it."""
    optimizer: torch.optim.Optimizer
    normalizer: AdvantageNormalizer
    packing: Packing
    head: Head | None
    """How log-probs are had without logits. None: from the model's own logits."""
    checkpoint: Checkpoint | None
    """What the run goes on from."""

    @property
    def state(self) -> RunState | None:
        """The counts that the run goes on from; None: it starts."""
        return self.checkpoint.state if self.checkpoint is not None else None


def checkpoint_directory(config: TrainerConfig) -> Path:
    """Where the run's checkpoints lie."""
    return config.train.output_dir / "checkpoints"


def prepare_run(config: TrainerConfig) -> Prepared:
    """Build everything that a run computes with.

    Raises:
        ConfigurationError: The model cannot be loaded, or output_dir holds a run that may not be resumed.
        CheckpointError: No checkpoint is whole, or the newest one may not be read or does not fit.
    """
    device = torch.device("cpu") if config.train.device == "cpu" else _default_device()
    # Others may pass through it, but not look into it, where inference servers read what is published below.
    shared = config.publish.readable_by != "owner" and config.publish.directory is None
    make_run_directory(config.train.output_dir, mode=0o711 if shared else PRIVATE_DIRECTORY)
    accelerator = Accelerator(
        mixed_precision=choose_mixed_precision(config.train, device),
        cpu=config.train.device == "cpu",
        log_with=list(config.logging.trackers) or None,
        project_dir=str(config.train.output_dir),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PROCESS_GROUP_TIMEOUT)],
    )
    checkpoint = find_checkpoint(config, accelerator)
    # Equal weights everywhere (adapters are drawn at random), then different random numbers per process.
    set_seed(config.train.seed)
    policy = load_policy(config.model, config.data, checkpoint)
    policy.model.to(accelerator.device)
    packing = choose_packing(
        policy.model,
        config.data.packing,
        config.model.attention,
        longest_sequence=policy.limits.max_sequence_length,
    )
    head = choose_head(policy.model, config.model.head)
    set_seed(config.train.seed, device_specific=True)
    optimizer = make_optimizer(policy.model, config.optimizer)
    normalizer = AdvantageNormalizer(config.data.advantage_normalization)
    if checkpoint is not None:
        restore_optimizer(checkpoint, optimizer, trained_parameter_names(policy.model))
        restore_random_states(checkpoint, accelerator.process_index)
        normalizer.load_state_dict(checkpoint.state.normalizer)
    model, wrapped_optimizer = accelerator.prepare(policy.model, optimizer)
    return Prepared(
        accelerator=accelerator,
        policy=policy,
        model=model,
        optimizer=wrapped_optimizer,
        normalizer=normalizer,
        packing=packing,
        head=head,
        checkpoint=checkpoint,
    )


def make_step_runner(config: TrainerConfig, prepared: Prepared) -> StepRunner:
    """What runs the optimizer steps of a prepared run."""
    return StepRunner(
        prepared.accelerator,
        prepared.model,
        prepared.optimizer,
        loss=config.loss,
        packing=prepared.packing,
        head=prepared.head,
        tokens_per_micro_batch=config.data.tokens_per_micro_batch,
        max_grad_norm=config.optimizer.max_grad_norm,
    )


def find_checkpoint(config: TrainerConfig, accelerator: Accelerator) -> Checkpoint | None:
    """Find what the run goes on from: the newest checkpoint of which every byte is what was written.

    Process 0 looks, and puts in order what an earlier process left; the others take what it found.

    Raises:
        ConfigurationError: There is something, and `train.resume` forbids to use it.
        CheckpointError: See `newest_whole_checkpoint`.
    """
    directory = checkpoint_directory(config)
    if accelerator.num_processes == 1:
        return _find_checkpoint(config, directory)
    checkpoint, step = None, _FAILED
    try:
        if accelerator.is_main_process:
            checkpoint = _find_checkpoint(config, directory)
            step = _NONE if checkpoint is None else checkpoint.state.step
    finally:  # the others must hear of it whatever happened
        step = int(broadcast(torch.tensor([step], device=accelerator.device)).item())
    if step == _FAILED:
        raise CheckpointError("process 0 found no checkpoint to go on from; its message says why")
    if checkpoint is None and step != _NONE:
        checkpoint = read_checkpoint(checkpoint_path(directory, step))
    return checkpoint


def _find_checkpoint(config: TrainerConfig, directory: Path) -> Checkpoint | None:
    recover_checkpoints(directory)
    existing = list_checkpoints(directory)
    if existing and config.train.resume == "never":
        raise ConfigurationError(
            f"{config.train.output_dir} holds a run already ({existing[-1].name}) and train.resume is never; "
            "choose another train.output_dir, or train.resume auto to go on with it"
        )
    checkpoint = newest_whole_checkpoint(directory)
    if checkpoint is not None:
        logger.info("Going on from checkpoint %s", checkpoint.path)
    return checkpoint


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over the trained parameters, in the model's order."""
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide a run's numbers."""
    names = ("atropos-trainer", "torch", "transformers", "accelerate", "safetensors")
    return {name: importlib.metadata.version(name) for name in names}


def _default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")

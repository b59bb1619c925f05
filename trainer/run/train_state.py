"""Prepares a run: its processes, the policy, the optimizer, and the state they start from."""

from __future__ import annotations

import importlib.metadata
import sys
from dataclasses import dataclass
from typing import Any, Final

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import nn

from trainer.checkpoints.format import (
    Checkpoint,
    CheckpointState,
    restore_optimizer,
)
from trainer.config import OptimizerSettings, TrainerConfig
from trainer.model.attention import require_splittable
from trainer.model.lm_head import LogitTransform
from trainer.model.lm_head.select import choose_head
from trainer.model.load import DTYPES, Policy, load_policy, reads_rows_only
from trainer.model.reference import ReferenceModel, load_reference
from trainer.model.select_packing import choose_packing
from trainer.model.sharding import WHOLE, Spread, make_spread
from trainer.packing import Packing
from trainer.run.data_parallel import freeze_unused_parameters, settle_gradient_buckets
from trainer.run.entropy_bonus import EntropyBonus
from trainer.run.processes import JoinedRun, join_run
from trainer.run.start import Accept, accept_any, find_checkpoint
from trainer.samples.advantages import AdvantageNormalizer

BEFORE_THE_FIRST_STEP: Final = CheckpointState(
    step=0, policy_version=0, batches=0, counters={}, normalizer={}, stored_dtype="", parameter_names=[]
)


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run that is ready for its first step."""

    joined: JoinedRun
    """Its place among the processes; released when the run ends."""
    policy: Policy
    """Its `model` is the unwrapped one."""
    model: nn.Module
    """As Accelerate wrapped it."""
    spread: Spread
    """Spread of its weights over the processes."""
    optimizer: torch.optim.Optimizer
    normalizer: AdvantageNormalizer
    entropy_bonus: EntropyBonus
    packing: Packing
    head: LogitTransform | None
    """Fused LM head, and what the model does to its output; None computes the model's own logits."""
    reference: ReferenceModel | None
    """None: groups bring a reference's log-probs, or nobody wants them."""
    checkpoint: Checkpoint | None
    """The checkpoint that the run goes on from."""

    @property
    def accelerator(self) -> Accelerator:
        """Accelerate's view of devices and processes."""
        return self.joined.accelerator

    @property
    def state(self) -> CheckpointState:
        """The counts that the run goes on from; all 0 where it starts."""
        return self.checkpoint.state if self.checkpoint is not None else BEFORE_THE_FIRST_STEP


def prepare_run(
    config: TrainerConfig, joined: JoinedRun | None = None, accept: Accept = accept_any
) -> PreparedRun:
    """Build everything that a run computes with.

    Args:
        config: The configuration.
        joined: This process's place in the run, which stays the caller's. None: find it.
        accept: See `find_checkpoint`.

    Raises:
        ConfigurationError: The model cannot be loaded, or output_dir holds a run that may not be resumed,
            or not with these settings.
        CheckpointError: No checkpoint is whole, or the newest one may not be read or does not fit.
        TrainerError, JournalLocked: See `join_run`.
    """
    joined = joined.share() if joined is not None else join_run(config)
    try:
        return _prepare(config, joined, accept)
    except BaseException:
        joined.release()
        raise


def _prepare(config: TrainerConfig, joined: JoinedRun, accept: Accept) -> PreparedRun:
    accelerator = joined.accelerator
    spread = make_spread(
        config.parallel,
        processes=accelerator.num_processes,
        rank=accelerator.process_index,
        device=accelerator.device,
    )
    checkpoint = find_checkpoint(config, accelerator, accept)
    # Equal weights everywhere: adapters are drawn at random.
    set_seed(config.train.seed)
    policy = load_trained_policy(config, checkpoint, rows_only=reads_rows_only(config.model, spread))
    policy.loaded.tested.to(accelerator.device)
    accelerator.ddp_handler = DistributedDataParallelKwargs(
        find_unused_parameters=freeze_unused_parameters(policy.loaded.tested),
        gradient_as_bucket_view=True,  # no second copy of the gradients while they are used
    )
    packing = choose_packing(
        policy.loaded.tested,
        config.data.packing,
        config.model.attention,
        longest_sequence=policy.limits.max_sequence_length,
    )
    if spread.sequence is not None:
        require_splittable(policy.loaded.tested, packing, spread.sequence)
    head = choose_head(policy.loaded.tested, config.model.head)
    policy.loaded.spread_over(spread, accelerator.device, DTYPES[config.model.dtype])
    reference = load_reference(
        config.loss.reference,
        config.model,
        policy=policy.model,
        head=head,
        packing=packing,
        limits=policy.limits,
        spread=spread,
    )
    optimizer = make_optimizer(policy.model, config.optimizer, spread)
    normalizer = AdvantageNormalizer(config.data.advantage_normalization)
    if checkpoint is not None:
        restore_optimizer(checkpoint, optimizer, policy.model, spread)
        normalizer.load_state_dict(checkpoint.state.normalizer)
    bonus = EntropyBonus(config.loss, checkpoint.state.entropy_bonus if checkpoint is not None else {})
    # What Accelerate puts around copies holds buffers as large as all gradients, and is for copies only:
    # sharded, the model synchronizes gradients itself, and a single process under a launcher has no others.
    copied = spread.copies > 1 and not spread.sharded
    model = accelerator.prepare_model(policy.model, evaluation_mode=not copied)
    wrapped_optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)
    if copied:
        settle_gradient_buckets(model)
    return PreparedRun(
        joined=joined,
        policy=policy,
        model=model,
        spread=spread,
        optimizer=wrapped_optimizer,
        normalizer=normalizer,
        entropy_bonus=bonus,
        packing=packing,
        head=head,
        reference=reference,
        checkpoint=checkpoint,
    )


def load_trained_policy(
    config: TrainerConfig, checkpoint: Checkpoint | None, *, rows_only: bool = False
) -> Policy:
    """Load the policy as the checkpoint has it; the base without one.

    Args:
        config: The configuration.
        checkpoint: What the run goes on from.
        rows_only: See `load_policy`.

    Raises:
        ConfigurationError, CheckpointError: See `load_policy` and `Checkpoint.trained_path`.
    """
    if checkpoint is None:
        return load_policy(config.model, config.data, rows_only=rows_only)
    trained = checkpoint.trained_path(adapters=config.model.lora is not None)
    return load_policy(
        config.model,
        config.data,
        trained,
        base_weights=checkpoint.state.base_weights,
        rows_only=rows_only,
    )


def make_optimizer(
    model: nn.Module, settings: OptimizerSettings, spread: Spread = WHOLE
) -> torch.optim.Optimizer:
    """AdamW over the trained parameters, in the model's order: torch's, or torchao's for what is smaller."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
        "weight_decay": settings.weight_decay,
    }
    eight_bit = settings.states == "8bit"
    if not eight_bit and all(each.dtype != torch.bfloat16 for each in parameters):
        return torch.optim.AdamW(parameters, fused=True, **options)
    from trainer.model.small_adamw import SmallAdamW

    return SmallAdamW(parameters, eight_bit=eight_bit, spread=spread, **options)


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide a run's numbers."""
    names = ["atropos-trainer", "torch", "transformers", "accelerate", "safetensors"]
    if "torchao" in sys.modules:
        names.append("torchao")
    return {name: importlib.metadata.version(name) for name in names}

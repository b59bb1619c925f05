"""Settings of training: sections `model`, `optimizer`, `train`, `checkpoint` and `logging`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from trainer.config._base import CommaList, PathOrHubId, Section


class LoraSettings(Section):
    """Low-rank adapters instead of full fine-tuning (needs the package peft)."""

    rank: int = Field(default=16, gt=0)
    """Rank of the adapters. Any setting of model.lora switches them on; without one all weights train."""
    alpha: float = Field(default=32.0, gt=0)
    """Adapters are scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' input."""
    target_modules: Literal["all-linear"] | CommaList[str] = Field("all-linear", union_mode="left_to_right")
    """Names of the modules that get an adapter."""


class ModelSettings(Section):
    """The causal language model."""

    path: PathOrHubId
    """Directory of a Hugging Face checkpoint (safetensors), or a hub id."""
    tokenizer_path: PathOrHubId | None = None
    """Where the tokenizer lies. None: beside the model."""
    attention: str = "auto"
    """Attention implementation. tiled: computes only what a token can see, on any device. flex: the same by
    FlexAttention, on a GPU. Others by transformers' name, e.g. sdpa, eager, flash_attention_2. auto: flex on
    a GPU, else tiled, and sdpa where the model cannot take them."""
    head: Literal["auto", "tiled", "logits"] = "auto"
    """Where log-probs come from. tiled: hidden states, in tiles, so that a micro-batch's logits never exist.
    logits: the model's own, in much more memory. auto: tiled where that gives the same log-probs at start."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in training. bfloat16: half the memory for weights and their gradients, and all is
    computed in bfloat16; trained weights are rounded at random, up or down, so that small steps count (needs
    the package torchao). With model.lora only the frozen base is bfloat16, adapters stay float32."""
    dropout: Literal["none", "keep"] = "none"
    """Dropout that the model's configuration asks for. none: off, so that the trainer's log-probs are those
    of the model that was sampled. keep: as configured. Adapters drop by model.lora.dropout either way."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run Python code that a hub model brings along. Only for sources you trust."""
    lora: LoraSettings | None = None
    """Train low-rank adapters; the base weights stay frozen. None: full fine-tuning."""


class OptimizerSettings(Section):
    """AdamW, its schedule, and clipping."""

    states: Literal["float32", "8bit"] = "float32"
    """Type of the two moments of each weight. 8bit: two bytes a weight instead of eight (torchao's, which is
    compiled in the first step; needs the package torchao)."""
    learning_rate: float = Field(default=1e-6, ge=0)
    """Learning rate after warm-up. 0 changes nothing: a self-test of the whole loop."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up: stay, or fall along a cosine to minimum_learning_rate_ratio at train.steps."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the learning rate rises linearly from 1/warmup_steps of itself."""
    minimum_learning_rate_ratio: float = Field(default=0.1, ge=0, le=1)
    """Cosine only: the last learning rate, as a share of learning_rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's first-moment decay."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's second-moment decay."""
    epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""


class TrainSettings(Section):
    """The run."""

    steps: int = Field(default=100, ge=0)
    """Optimizer steps after which the run ends. 0: set everything up, verify, and stop."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """One seed reproduces a run on CPU bit for bit, given the same batches."""
    output_dir: Path = Path("runs/default")
    """Where checkpoints, metrics, published and final weights go."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest checkpoint in output_dir if there is one. never: refuse to start there."""
    resume_changes: CommaList[str] = Field(default_factory=list)
    """Settings that may differ from the checkpoint's, by name, e.g. optimizer.learning_rate, or optimizer.*
    for all of a section. Without it a run that would go on with another mathematics is refused."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Autocast type; weights have their own (model.dtype). auto: bf16 where the hardware computes it
    natively."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: what Accelerate finds. cpu: the CPU even where there is an accelerator."""
    mismatch_alarm: float | None = Field(default=0.2, gt=0)
    """Mean absolute difference between the sampler's and the trainer's log-probs, in nats, from which on a
    batch of the current version is alarming. None: never."""
    mismatch_action: Literal["warn", "stop"] = "warn"
    """Effect of an alarm. warn: a line in the log, and mismatch_alarms_total. stop: the batch is set aside
    before the weights change, and the run ends."""
    masked_alarm: float | None = Field(default=0.5, gt=0, le=1)
    """Share of a step's trained tokens without gradient, because the loss or its correction masks them, past
    which there is a warning, once a run, and a count in masked_alarms_total. None: never."""
    max_consecutive_skips: int = Field(default=10, gt=0)
    """Stop after so many batches in a row that could not be trained (nothing usable, not finite)."""

    set_aside_alarm: float | None = Field(default=0.1, gt=0, le=1)
    """Share of the groups of the last set_aside_window batches past which the groups set aside are a warning,
    with the most frequent reasons, and count in set_aside_alarms_total. None: never."""
    set_aside_limit: float | None = Field(default=0.5, gt=0, le=1)
    """The same share, past which the run stops with a checkpoint. None: never."""
    set_aside_window: int = Field(default=20, gt=0)
    """Batches over which these shares are taken; nothing is judged before so many have come."""
    set_aside_max_bytes: int = Field(default=4 << 30, ge=1 << 20)
    """Most bytes that <output_dir>/set_aside may take; its oldest files are deleted, and counted in
    set_aside_pruned_total."""


class CheckpointSettings(Section):
    """Checkpoints, which a run resumes from."""

    every: int = Field(default=50, gt=0)
    """Optimizer steps between two checkpoints; one more is written at the end and on Ctrl-C."""
    keep: int = Field(default=2, gt=0)
    """Newest checkpoints kept; older ones are deleted."""
    keep_every: int | None = Field(default=None, gt=0)
    """Checkpoints of steps that are multiples of it are never deleted; a multiple of checkpoint.every.
    None: only the newest stay."""
    grace: float = Field(default=10.0, ge=0)
    """Seconds that a step under way may still take after a signal to stop. Then it is given up between two
    micro-batches, and its batch is not counted as trained."""

    @model_validator(mode="after")
    def _kept_ones_are_written(self) -> Self:
        if self.keep_every is not None and self.keep_every % self.every:
            raise ValueError(
                f"keep_every {self.keep_every} is not a multiple of every ({self.every}), so few or none of "
                f"its checkpoints would be written; set it to {self.every}, {2 * self.every}, ..."
            )
        return self


class LoggingSettings(Section):
    """Log lines, and trackers beside metrics.jsonl, which is always written."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lowest level of log lines shown."""
    progress: bool = True
    """One line a step on the terminal."""
    trackers: CommaList[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """Experiment trackers to send every metric to, through Accelerate; each needs its package."""
    project: str = "atropos-trainer"
    """Project name for trackers; environments read it from the API for their own logging."""
    group: str = ""
    """Run group for trackers and environments."""
    rollouts: int = Field(default=8, ge=0)
    """Sequences, the best and the worst, of the first and of every tenth step that W&B and trackio get as a
    table `rollouts`, prompts and answers cut at 8,000 characters. 0: none."""
    token_logprobs: int = Field(default=2, ge=0)
    """Groups of each step whose tokens' log-probs, as the trainer computed them before the step, are
    recorded in <output_dir>/token_logprobs.jsonl: the page of the run shows them beside the sampler's. 0:
    none. The file and the one before it take 64 MiB each at most."""

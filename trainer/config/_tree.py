"""The whole configuration as one tree."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Self

from pydantic import Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from trainer.config._atropos import AtroposSettings, DataSettings, JournalSettings, LossSettings
from trainer.config._base import Section
from trainer.config._distillation import DistillationSettings
from trainer.config._inert import inert_settings
from trainer.config._parallel import ParallelSettings
from trainer.config._presets import with_preset
from trainer.config._publish import PublishSettings
from trainer.config._training import (
    CheckpointSettings,
    LoggingSettings,
    ModelSettings,
    OptimizerSettings,
    TrainSettings,
)
from trainer.config._watch import HealthSettings, WatchdogSettings


class TrainerConfig(Section):
    """Every setting of a run; each has its type, constraint, unit and default in its own section."""

    model: ModelSettings
    """The causal language model."""
    atropos: AtroposSettings = Field(default_factory=AtroposSettings)
    """The Atropos API server that scored rollouts are fetched from."""
    journal: JournalSettings = Field(default_factory=JournalSettings)
    """Every batch on the disk before anything is done with it."""
    data: DataSettings = Field(default_factory=DataSettings)
    """From scored groups to micro-batches."""
    loss: LossSettings = Field(default_factory=LossSettings)
    """The objective."""
    distillation: DistillationSettings = Field(default_factory=DistillationSettings)
    """Learning from a teacher's candidate tokens, which environments send as distill_token_ids."""
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    """AdamW, its schedule, and clipping."""
    train: TrainSettings = Field(default_factory=TrainSettings)
    """The run."""
    parallel: ParallelSettings = Field(default_factory=ParallelSettings)
    """Spread of the weights over the processes that train together."""
    publish: PublishSettings = Field(default_factory=PublishSettings)
    """Publishing weights and proving that they are served."""
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    """Checkpoints, which a run resumes from."""
    logging: LoggingSettings = Field(default_factory=LoggingSettings)
    """Log lines, and trackers beside metrics.jsonl."""
    watchdog: WatchdogSettings = Field(default_factory=WatchdogSettings)
    """Ends a run that is stuck: a deadline for each phase of the training thread."""
    health: HealthSettings = Field(default_factory=HealthSettings)
    """Reports the state of the run to an orchestrator."""
    _replaced: dict[str, tuple[str, Any]] = PrivateAttr(default_factory=dict)

    @property
    def replaced_by_preset(self) -> Mapping[str, tuple[str, Any]]:
        """Settings of a lower layer that a preset replaced: by dotted name, where it stood, and its value."""
        return self._replaced

    def note_replaced(self, replaced: Mapping[str, tuple[str, Any]]) -> None:
        """Note what `replaced_by_preset` returns, for messages."""
        self._replaced = dict(replaced)

    @model_validator(mode="before")
    @classmethod
    def _preset_is_laid_under(cls, values: Any) -> Any:
        return with_preset(values)

    @model_validator(mode="after")
    def _adapters_are_trained(self) -> Self:
        if self.publish.transport == "lora" and self.model.lora is None:
            raise ValueError(
                "publish.transport is 'lora' but model.lora is not set, so there is no adapter to publish; "
                "set model.lora.rank, or set publish.transport to 'disk'"
            )
        return self

    @model_validator(mode="after")
    def _kl_in_the_reward_comes_with_the_groups(self) -> Self:
        if self.data.reward_kl_coefficient and self.loss.reference != "batch":
            raise ValueError(
                "data.reward_kl_coefficient takes the reference's log-probs that environments send "
                f"(ref_logprobs), and loss.reference {self.loss.reference} is computed here, after scores "
                "have become advantages: have the KL in the loss (loss.kl_coefficient instead of "
                "data.reward_kl_coefficient), or leave loss.reference out"
            )
        return self

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> Self:
        inert = [
            InitErrorDetails(
                type=PydanticCustomError("inert", "{reason}", {"reason": reason}),
                loc=tuple(name.split(".")),
                input=value,
            )
            for name, value, reason in inert_settings(self.loss, self.distillation)
        ]
        if inert:
            raise ValidationError.from_exception_data(type(self).__name__, inert)
        return self

    @model_validator(mode="after")
    def _packages_are_installed(self) -> Self:
        wanted = {"peft": "model.lora"} if self.model.lora is not None else {}
        if self.model.dtype == "bfloat16" and self.model.lora is None:
            wanted["torchao"] = "model.dtype bfloat16 without model.lora"
        if self.optimizer.states == "8bit":
            wanted["torchao"] = "optimizer.states 8bit"
        wanted |= {"prometheus_client": "health.prometheus"} if self.health.prometheus else {}
        wanted |= dict.fromkeys(self.logging.trackers, "logging.trackers")
        for package, setting in wanted.items():
            if not _is_installed(package):
                raise ValueError(f"{setting} needs the package {package}: pip install {package}")
        return self


def _is_installed(package: str) -> bool:
    """True if it can be imported; a mere directory of its name, such as wandb leaves, is none."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None

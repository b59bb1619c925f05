"""Configuration of a run: one frozen tree, read once, refused at the start if anything in it is wrong."""

from trainer.config._atropos import AtroposSettings, DataSettings, JournalSettings, LossSettings
from trainer.config._fields import ConfigField, config_fields
from trainer.config._load import ENVIRONMENT_PREFIX, load_config
from trainer.config._publish import PublishSettings
from trainer.config._training import (
    CheckpointSettings,
    LoggingSettings,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    TrainSettings,
)
from trainer.config._tree import TrainerConfig
from trainer.config._watch import HealthSettings, WatchdogSettings

__all__ = [
    "ENVIRONMENT_PREFIX",
    "AtroposSettings",
    "CheckpointSettings",
    "ConfigField",
    "DataSettings",
    "HealthSettings",
    "JournalSettings",
    "LoggingSettings",
    "LoraSettings",
    "LossSettings",
    "ModelSettings",
    "OptimizerSettings",
    "PublishSettings",
    "TrainSettings",
    "TrainerConfig",
    "WatchdogSettings",
    "config_fields",
    "load_config",
]

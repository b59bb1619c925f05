"""Configuration of a run: one frozen tree, read once, refused at the start if anything in it is wrong."""

from trainer.config._atropos import DataSettings, LossSettings, plain_url
from trainer.config._base import expand_home
from trainer.config._describe_preset import describe_preset
from trainer.config._distillation import DistillationSettings
from trainer.config._fields import config_fields, fields_by_section, option_fields
from trainer.config._load import ENVIRONMENT_PREFIX, load_config
from trainer.config._parallel import ParallelSettings
from trainer.config._presets import PRESETS, Preset, PresetName, leaves
from trainer.config._publish import PublishSettings
from trainer.config._resume import ON_RESUME, OnResume, refuse_changed_settings, row_of
from trainer.config._training import (
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    TrainSettings,
)
from trainer.config._tree import TrainerConfig

__all__ = [
    "ENVIRONMENT_PREFIX",
    "ON_RESUME",
    "PRESETS",
    "DataSettings",
    "DistillationSettings",
    "LoraSettings",
    "LossSettings",
    "ModelSettings",
    "OnResume",
    "OptimizerSettings",
    "ParallelSettings",
    "Preset",
    "PresetName",
    "PublishSettings",
    "TrainSettings",
    "TrainerConfig",
    "config_fields",
    "describe_preset",
    "expand_home",
    "fields_by_section",
    "leaves",
    "load_config",
    "option_fields",
    "plain_url",
    "refuse_changed_settings",
    "row_of",
]

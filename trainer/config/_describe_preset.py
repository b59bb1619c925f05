"""Says in one line what a preset sets, and what a run made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.config._presets import CHOICES, PRESETS, PresetName
from trainer.config._tree import TrainerConfig


def describe_preset(name: PresetName, config: TrainerConfig | None = None) -> str:
    """Say what a preset sets, e.g. `loss.name ppo_clip, loss.epsilon_low 0.2`.

    Args:
        name: Of the preset.
        config: The configuration of a run, to say what it came to there, with all that was added by hand.
    """
    preset = PRESETS[name]
    if config is None:
        return ", ".join(f"{setting} {value}" for setting, value in preset.settings.items())
    come_to = _objective_settings(config)
    exchanged = preset.exchanged(come_to["loss.name"], come_to["data.advantage_estimator"])
    told: dict[str, str] = {}
    for setting, value in preset.settings.items():
        if setting not in CHOICES and setting.startswith(exchanged):
            continue
        found = come_to.get(setting)
        told[setting] = str(found) if found == value else f"{found} (by hand, in place of {value})"
        if setting == "loss.reduction" and found == "constant":
            told["loss.constant_length"] = str(config.loss.constant_length)
    line = ", ".join(f"{setting} {value}" for setting, value in told.items())
    defaults = _objective_settings(_with_defaults(config))
    added = [
        f"{setting} {value}"
        for setting, value in come_to.items()
        if setting not in told and value != defaults.get(setting)
    ]
    return f"{line}; added by hand: {', '.join(added)}" if added else line


def _with_defaults(config: TrainerConfig) -> TrainerConfig:
    """The configuration with the same loss and estimator, and nothing else about the objective."""
    return TrainerConfig.model_validate(
        {
            "model": config.model,
            "loss": {"name": config.loss.name},
            "data": {"advantage_estimator": config.data.advantage_estimator},
        }
    )


def _objective_settings(config: TrainerConfig) -> dict[str, Any]:
    """What makes up the objective, by dotted name; loss.preset is only a name for it."""
    sections = {"loss": config.loss, "data": config.data, "distillation": config.distillation}
    tree = {name: section.model_dump() for name, section in sections.items()}
    return {
        name: value
        for name, value in _leaves(tree)
        if name.startswith(("loss.", "distillation.", "data.advantage_", "data.reward_"))
        and name != "loss.preset"
    }


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value

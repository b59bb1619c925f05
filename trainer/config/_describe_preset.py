"""Says in one line what a preset sets, and what a run made of it."""

from __future__ import annotations

from typing import Any

from trainer.config._layers import SHARED_OPTIONS
from trainer.config._presets import PRESETS, PresetName, leaves
from trainer.config._tree import TrainerConfig

_CAPPED = ("token_tis", "sequence_tis")


def describe_preset(name: PresetName, config: TrainerConfig | None = None) -> str:
    """Say what a preset sets, e.g. `loss.name ppo_clip, loss.epsilon_low 0.2`.

    Args:
        name: Of the preset.
        config: The configuration of a run, to say what it came to there: with all that was added by hand, and
            with what was left out of the preset and of lower layers.
    """
    preset = PRESETS[name]
    if config is None:
        return ", ".join(f"{setting} {value}" for setting, value in preset.settings.items())
    come_to = _objective_settings(config)
    dropped = preset.dropped(come_to)
    replaced = config.replaced_by_preset
    told: dict[str, str] = {}
    for setting, value in preset.settings.items():
        if setting in dropped:
            continue
        found = come_to.get(setting)
        told[setting] = str(found)
        if found != value:
            told[setting] += f" (by hand, in place of {value})"
        elif setting in replaced and not _is_same(replaced[setting][1], value):
            told[setting] += f" (in place of {replaced[setting][0]}'s {replaced[setting][1]})"
        if setting == "loss.name" and found != value:
            told |= _own_options(come_to, config)
        if setting == "loss.reduction" and found == "constant":
            told["loss.constant_length"] = str(config.loss.constant_length)
    weight = come_to.get("loss.correction.weight")
    if weight in _CAPPED:
        told["loss.correction.ratio_cap"] = str(come_to["loss.correction.ratio_cap"])
    defaults = _objective_settings(_with_defaults(config))
    added = [
        f"{setting} {value}"
        for setting, value in come_to.items()
        if setting not in told and value != defaults.get(setting)
    ]
    left_out: dict[str, list[str]] = {}
    lost = [(name, "the preset", value) for name, value in dropped.items() if told.get(name) != str(value)]
    lost += [(setting, *lower) for setting, lower in replaced.items() if setting not in preset.settings]
    for setting, source, value in lost:
        if source == "the preset" or not _is_same(value, come_to.get(setting)):
            left_out.setdefault(source, []).append(f"{setting} {value}")
    line = ", ".join(f"{setting} {value}" for setting, value in told.items())
    line += f"; added by hand: {', '.join(added)}" if added else ""
    return line + "".join(f"; left out of {source}: {', '.join(each)}" for source, each in left_out.items())


def _own_options(come_to: dict[str, Any], config: TrainerConfig) -> dict[str, str]:
    """The options of the loss of a run that not every loss has."""
    own = (f"loss.{option}" for option in type(config.loss.bound.options).model_fields)
    return {name: str(come_to[name]) for name in own if name in come_to and name not in SHARED_OPTIONS}


def _is_same(written: Any, value: Any) -> bool:
    """True if the text of a file or a variable is that of a value; 0.20 is 0.2."""
    try:
        return float(written) == float(value)
    except (TypeError, ValueError):
        return str(written) == str(value)


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
    """Settings that make up the objective, by dotted name; loss.preset is only a name for it."""
    sections = {"loss": config.loss, "data": config.data, "distillation": config.distillation}
    tree = {name: section.model_dump() for name, section in sections.items()}
    return {
        name: value
        for name, value in leaves(tree)
        if name.startswith(("loss.", "distillation.", "data.advantage_", "data.reward_"))
        and name != "loss.preset"
    }

"""Takes out of lower layers (file < environment < command line) what a preset of a higher one decides."""

from __future__ import annotations

from typing import Any

from trainer.config._atropos import LossSettings
from trainer.config._presets import CHOICES, PRESETS, leaves
from trainer.options import LOSS_OPTIONS, CorrectionOptions, KlOptions

_OF_A_RATIO = ("weight", "ratio_cap", "icepop_low", "icepop_high")
# Of every loss of ours: no preset decides them.
SHARED_OPTIONS = {f"loss.{name}" for name in KlOptions.model_fields} | {
    f"loss.correction.{name}" for name in CorrectionOptions.model_fields if name not in _OF_A_RATIO
}
_OWN_OPTIONS = {f"loss.{name}" for options in LOSS_OPTIONS.values() for name in options.model_fields} | {
    f"loss.correction.{name}" for name in _OF_A_RATIO
}


def take_out(lower: dict[str, Any], higher: dict[str, Any]) -> dict[str, Any]:
    """Delete from `lower` what the preset of `higher` decides, if it names one.

    With the loss, the estimator and the mode of distillation go their options; a key that no loss has stays,
    to be refused.

    Returns:
        What was deleted, by dotted name.
    """
    section = higher.get("loss")
    preset = section.get("preset") if isinstance(section, dict) else None
    if not isinstance(preset, str) or preset not in PRESETS:
        return {}
    sections = ["data.advantage_options."]
    if "distillation.mode" in PRESETS[preset].settings:  # type: ignore[index]
        sections.append("distillation.")
    below = dict(leaves(lower))
    is_users = ":" in str(below.get("loss.name"))  # whose options are known only to itself
    taken = {
        name: value
        for name, value in below.items()
        if name in CHOICES or name.startswith(tuple(sections)) or _is_own_option(name, is_users=is_users)
    }
    for name in taken:
        *parents, key = name.split(".")
        tree = lower
        for parent in parents:
            tree = tree[parent]
        del tree[key]
    return taken


def _is_own_option(name: str, *, is_users: bool) -> bool:
    """True for an option of a loss that other losses may lack, or mean differently."""
    section, _, option = name.partition(".")
    if section != "loss" or option in LossSettings.model_fields or name in SHARED_OPTIONS:
        return False
    return is_users or name in _OWN_OPTIONS

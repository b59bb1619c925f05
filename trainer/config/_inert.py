"""Finds settings that have no effect, because what they belong to is not chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from trainer.config._atropos import LossSettings
from trainer.config._distillation import DistillationSettings
from trainer.config._presets import leaves
from trainer.extensions import Loss
from trainer.options import LOSS_OPTIONS, CorrectionOptions, KlOptions

_CHOSEN_BY: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "loss.kl_estimator": ("loss.kl_coefficient", ()),
    "loss.kl_cap": ("loss.kl_coefficient", ()),
    "loss.correction.ratio_cap": ("loss.correction.weight", ("token_tis", "sequence_tis")),
    "loss.correction.icepop_low": ("loss.correction.weight", ("icepop",)),
    "loss.correction.icepop_high": ("loss.correction.weight", ("icepop",)),
    "loss.correction.reject_estimator": ("loss.correction.reject", ()),
    "loss.correction.reject_above": ("loss.correction.reject", ()),
    "loss.correction.reject_below": ("loss.correction.reject", ()),
    "loss.constant_length": ("loss.reduction", ("constant",)),
    "loss.entropy_step": ("loss.entropy_target", ()),
    "distillation.coefficient": ("distillation.mode", ()),
    "distillation.reward_coefficient": ("distillation.mode", ()),
}
"""From a setting to the one that chooses it, and to the values of it that do; no values: all but off."""


def inert_settings(loss: LossSettings, distillation: DistillationSettings) -> Iterator[tuple[str, Any, str]]:
    """Yield settings without effect: name, value, and what would give it one.

    Those at their defaults pass; so do those whose choice was switched off by hand, as a sweep over a
    coefficient does it whose first value is 0.
    """
    defaults = _defaults(loss)
    by_hand = dict(leaves({"loss": _set_in(loss), "distillation": _set_in(distillation)}))
    for name, (choice, wanted) in _CHOSEN_BY.items():
        if name not in by_hand or name not in defaults or by_hand[name] == defaults[name]:
            continue
        chosen = by_hand.get(choice)
        is_off = chosen in (None, "none", 0)
        if choice not in by_hand or (wanted and not is_off and chosen not in wanted):
            needed = f"{choice} {' or '.join(wanted)}" if wanted else choice
            yield name, by_hand[name], f"it has no effect without {needed}: set that, or leave {name} out"


def _set_in(section: BaseModel) -> dict[str, Any]:
    return {name: getattr(section, name) for name in section.model_fields_set}


def _defaults(loss: LossSettings) -> dict[str, Any]:
    """Defaults by dotted name; of the options of the loss only those that ours share."""
    name = loss.name
    options = LOSS_OPTIONS[name] if name in LOSS_OPTIONS else Loss.find(name).options
    fields = {"loss": LossSettings.model_fields, "distillation": DistillationSettings.model_fields}
    if issubclass(options, KlOptions):
        fields["loss"] = {**fields["loss"], **KlOptions.model_fields}
    correction = options.model_fields.get("correction")
    if correction is not None and correction.annotation is CorrectionOptions:
        fields["loss.correction"] = CorrectionOptions.model_fields
    return {
        f"{section}.{key}": field.default for section, each in fields.items() for key, field in each.items()
    }

"""Which settings a resumed run may change: one table, and the comparison with a checkpoint's own."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any, Final

from trainer.config._fields import config_fields
from trainer.config._tree import TrainerConfig
from trainer.errors import ConfigurationError
from trainer.extensions import Options

logger = logging.getLogger(__name__)

_ABSENT: Final = object()


class OnResume(Enum):
    """Consequence of a setting that differs from the one in the checkpoint."""

    FREE = "takes effect"
    """It decides how the run goes on, not what is learned."""
    NAMED = "takes effect if train.resume_changes names it, otherwise the run is refused"
    """It changes what is computed from here on."""
    NEVER = "the run is refused"
    """The saved state means nothing without it."""


ON_RESUME: Final[Mapping[str, OnResume]] = {
    "model.lora.*": OnResume.NEVER,
    "model.attention": OnResume.FREE,
    "model.head": OnResume.FREE,
    "model.gradient_checkpointing": OnResume.FREE,
    "model.trust_remote_code": OnResume.FREE,
    "model.*": OnResume.NAMED,
    "atropos.batch_size": OnResume.NAMED,
    "atropos.max_token_length": OnResume.NAMED,
    "atropos.*": OnResume.FREE,
    "journal.*": OnResume.FREE,
    "data.packing": OnResume.FREE,
    "data.tokens_per_micro_batch": OnResume.FREE,
    "data.*": OnResume.NAMED,
    "loss.preset": OnResume.FREE,  # what it came to is compared
    "loss.*": OnResume.NAMED,
    "distillation.*": OnResume.NAMED,
    "optimizer.*": OnResume.NAMED,
    "train.steps": OnResume.FREE,
    "train.output_dir": OnResume.FREE,
    "train.resume": OnResume.FREE,
    "train.resume_changes": OnResume.FREE,
    "train.device": OnResume.FREE,
    "train.mismatch_*": OnResume.FREE,
    "train.masked_alarm": OnResume.FREE,
    "train.max_consecutive_skips": OnResume.FREE,
    "train.set_aside_*": OnResume.FREE,
    "train.*": OnResume.NAMED,
    "parallel.*": OnResume.FREE,
    "publish.*": OnResume.FREE,
    "checkpoint.*": OnResume.FREE,
    "logging.*": OnResume.FREE,
    "watchdog.*": OnResume.FREE,
    "health.*": OnResume.FREE,
}
"""The first row that speaks of a setting decides; a test holds that each row does of one, and of each one."""


def row_of(name: str) -> str:
    """The row of the table that decides about a setting."""
    return next(row for row in ON_RESUME if fnmatchcase(name, row))


def refuse_changed_settings(stored: Mapping[str, Any], config: TrainerConfig, *, checkpoint: str) -> None:
    """Compare a checkpoint's configuration with the run's; warn of the changes that were asked for.

    Settings that came after the version which wrote the checkpoint are not compared: it does not know them.

    Args:
        stored: The configuration in the checkpoint's manifest.
        config: The run's.
        checkpoint: Its name, for the message.

    Raises:
        ConfigurationError: A setting differs that may not, or not without being named; it lists them all.
    """
    current = config.model_dump(mode="json")
    may_change = config.train.resume_changes
    refused, to_name = [], []
    options = [f"loss.{name}" for name in config.loss.bound.options.model_dump()]
    for name in (*(field.name for field in config_fields()), *options):
        before, now = _value(stored, name), _value(current, name)
        if name == "data.advantage_options" and isinstance(before, Mapping):
            before = _known_options(config.data.bound_estimator.options, before)
        if before is _ABSENT or before == now:
            continue
        kind = ON_RESUME[row_of(name)]
        text = f"{name}: {json.dumps(before)} in the checkpoint, {json.dumps(now)} now"
        if kind is OnResume.NEVER:
            refused.append(f"{text} (cannot be changed)")
        elif kind is OnResume.NAMED and not any(fnmatchcase(name, given) for given in may_change):
            refused.append(text)
            to_name.append(name)
        elif kind is OnResume.NAMED:
            logger.warning("Going on with another setting: %s", text)
    if refused:
        named = f"name what may change, --train.resume_changes {','.join(to_name)}; or " if to_name else ""
        raise ConfigurationError(
            f"{config.train.output_dir} holds a run with other settings ({checkpoint}):\n  "
            + "\n  ".join(refused)
            + f"\nPut them back; or {named}start anew with another train.output_dir."
        )


def _known_options(options: Options, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Stored values of the options that an estimator has now; of those that came since, the defaults."""
    known = type(options).model_fields
    defaults = {name: field.get_default() for name, field in known.items() if not field.is_required()}
    return defaults | {name: value for name, value in stored.items() if name in known}


def _value(tree: Mapping[str, Any], name: str) -> Any:
    """A setting in a dumped configuration; None below a section that is None."""
    value: Any = tree
    for key in name.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping) or key not in value:
            return _ABSENT
        value = value[key]
    return value

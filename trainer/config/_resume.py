"""Which settings a resumed run may change: one table, and the comparison with a checkpoint's own."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from enum import Enum
from typing import Any, Final

from trainer.config._fields import config_fields
from trainer.config._tree import TrainerConfig
from trainer.errors import ConfigurationError

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
    "model.path": OnResume.NAMED,
    "model.tokenizer_path": OnResume.NAMED,
    "model.attention": OnResume.FREE,
    "model.head": OnResume.FREE,
    "model.dropout": OnResume.NAMED,
    "model.gradient_checkpointing": OnResume.FREE,
    "model.trust_remote_code": OnResume.FREE,
    "model.lora.*": OnResume.NEVER,
    "atropos.url": OnResume.FREE,
    "atropos.environment_checkpoint_dir": OnResume.FREE,
    "atropos.batch_size": OnResume.NAMED,
    "atropos.max_token_length": OnResume.NAMED,
    "atropos.prefetch": OnResume.FREE,
    "atropos.token": OnResume.FREE,
    "atropos.headers": OnResume.FREE,
    "atropos.ca_file": OnResume.FREE,
    "atropos.connect_timeout": OnResume.FREE,
    "atropos.read_timeout": OnResume.FREE,
    "atropos.max_body_bytes": OnResume.FREE,
    "atropos.ready_timeout": OnResume.FREE,
    "atropos.heartbeat_every": OnResume.FREE,
    "atropos.batch_timeout": OnResume.FREE,
    "journal.*": OnResume.FREE,
    "data.advantage_estimator": OnResume.NAMED,
    "data.advantage_options": OnResume.NAMED,
    "data.advantage_normalization": OnResume.NAMED,
    "data.advantage_clip": OnResume.NAMED,
    "data.advantage_limit": OnResume.NAMED,
    "data.packing": OnResume.FREE,
    "data.tokens_per_micro_batch": OnResume.FREE,
    "data.max_sequence_length": OnResume.NAMED,
    "data.sampling_temperature": OnResume.NAMED,
    "data.sampling_temperature_of": OnResume.NAMED,
    "loss.*": OnResume.NAMED,
    "optimizer.*": OnResume.NAMED,
    "train.steps": OnResume.FREE,
    "train.seed": OnResume.NAMED,
    "train.output_dir": OnResume.FREE,
    "train.resume": OnResume.FREE,
    "train.resume_changes": OnResume.FREE,
    "train.mixed_precision": OnResume.NAMED,
    "train.device": OnResume.FREE,
    "train.mismatch_alarm": OnResume.FREE,
    "train.mismatch_action": OnResume.FREE,
    "train.max_consecutive_skips": OnResume.FREE,
    "train.set_aside_alarm": OnResume.FREE,
    "train.set_aside_limit": OnResume.FREE,
    "train.set_aside_window": OnResume.FREE,
    "train.set_aside_max_bytes": OnResume.FREE,
    "publish.*": OnResume.FREE,
    "checkpoint.*": OnResume.FREE,
    "logging.*": OnResume.FREE,
    "watchdog.*": OnResume.FREE,
    "health.*": OnResume.FREE,
}
"""Of every setting, or of a whole section; a test holds that each setting is in it once."""


def matching_rows(name: str) -> list[str]:
    """The rows of the table that speak of a setting."""
    return [row for row in ON_RESUME if row == name or (row.endswith("*") and name.startswith(row[:-1]))]


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
    refused, to_name = [], []
    options = [f"loss.{name}" for name in config.loss.bound.options.model_dump()]
    for name in (*(field.name for field in config_fields()), *options):
        before, now = _value(stored, name), _value(current, name)
        if before is _ABSENT or before == now:
            continue
        kind = next((ON_RESUME[row] for row in matching_rows(name)), OnResume.NAMED)
        text = f"{name}: {json.dumps(before)} in the checkpoint, {json.dumps(now)} now"
        if kind is OnResume.NEVER:
            refused.append(f"{text} (cannot be changed)")
        elif kind is OnResume.NAMED and name not in config.train.resume_changes:
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

"""Training a language model on scored rollouts: batch -> samples -> loss -> step -> publish -> checkpoint.

Names are loaded when they are first used: `atropos-train --help` and a wrong configuration key need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config import TrainerConfig, load_config
    from trainer.model.weighted_sft_call import compute_advantage_weighted_sft_loss
    from trainer.run.loop import RunSummary, Trainer
    from trainer.run.train_state import PreparedRun, prepare_run
    from trainer.sources.incoming import BatchSource
    from trainer.sources.live import AtroposSource
    from trainer.sources.recorded import RecordedSource

__all__ = [
    "AtroposSource",
    "BatchSource",
    "PreparedRun",
    "RecordedSource",
    "RunSummary",
    "Trainer",
    "TrainerConfig",
    "compute_advantage_weighted_sft_loss",
    "load_config",
    "prepare_run",
]

_HOMES = {
    "AtroposSource": "trainer.sources.live",
    "BatchSource": "trainer.sources.incoming",
    "PreparedRun": "trainer.run.train_state",
    "RecordedSource": "trainer.sources.recorded",
    "RunSummary": "trainer.run.loop",
    "Trainer": "trainer.run.loop",
    "TrainerConfig": "trainer.config",
    "compute_advantage_weighted_sft_loss": "trainer.model.weighted_sft_call",
    "load_config": "trainer.config",
    "prepare_run": "trainer.run.train_state",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)

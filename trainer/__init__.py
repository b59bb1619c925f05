"""Training a language model on scored rollouts: batch -> samples -> loss -> step -> publish -> checkpoint.

Names are loaded when they are first used: `atropos-train --help` and a wrong configuration key need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config import TrainerConfig, load_config
    from trainer.loop import RunSummary, Trainer
    from trainer.setup import Prepared, prepare_run
    from trainer.sources import AtroposSource, BatchSource, RecordedSource
    from trainer.weighted_sft import compute_advantage_weighted_sft_loss

__all__ = [
    "AtroposSource",
    "BatchSource",
    "Prepared",
    "RecordedSource",
    "RunSummary",
    "Trainer",
    "TrainerConfig",
    "compute_advantage_weighted_sft_loss",
    "load_config",
    "prepare_run",
]

_HOMES = {
    "AtroposSource": "trainer.sources",
    "BatchSource": "trainer.sources",
    "Prepared": "trainer.setup",
    "RecordedSource": "trainer.sources",
    "RunSummary": "trainer.loop",
    "Trainer": "trainer.loop",
    "TrainerConfig": "trainer.config",
    "compute_advantage_weighted_sft_loss": "trainer.weighted_sft",
    "load_config": "trainer.config",
    "prepare_run": "trainer.setup",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)

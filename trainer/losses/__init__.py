"""Loss functions over trained tokens: pure, token-aligned, reduced by a denominator the caller owns.

Purpose: turn the log-probs of a micro-batch and what the environment said about it into one scalar to
differentiate, plus sums for the metrics. Non-goals: no loss here runs the model, moves a column, talks to
other processes, or logs.

::

    log-probs, advantages, mask ─> LossInputs ─> weighted_sft | policy_gradient | ppo_clip ─> (loss, sums)

Each is a :class:`trainer.extensions.Loss`, as a user's own is. Every definition, with a worked example, is in
``docs/losses.md``.
"""

from __future__ import annotations

from trainer.losses._inputs import LossInputs
from trainer.losses._policy_gradient import policy_gradient
from trainer.losses._ppo_clip import ppo_clip
from trainer.losses._terms import k3, log_ratio, policy_metrics, reference_kl
from trainer.losses._weighted_sft import weighted_sft
from trainer.options import KlOptions

__all__ = [
    "KlOptions",
    "LossInputs",
    "k3",
    "log_ratio",
    "policy_gradient",
    "policy_metrics",
    "ppo_clip",
    "reference_kl",
    "weighted_sft",
]

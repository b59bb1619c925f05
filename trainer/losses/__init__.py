"""Loss functions over trained tokens: pure, token-aligned, reduced by a denominator the caller owns.

Purpose: turn the log-probs of a micro-batch and what the environment said about it into one scalar to
differentiate, plus sums for the metrics. Non-goals: no loss here runs the model, moves a column, talks to
other processes, or logs.

::

    log-probs, advantages, mask ─> LossInputs ─> a loss's term for each token ─> finish_loss ─> (loss, sums)

Each is a :class:`trainer.extensions.Loss`, as a user's own is. Its docstring has the term of a token; of all
of ours holds::

    loss = sum_t mask_t * (weight_t * term_t + kl_coefficient * KL_t) / denominator
    inputs     token-aligned; inference_logprobs at the same temperature as logprobs, required by all but
               weighted_sft; ref_logprobs with a KL penalty; sequence_ids where a sequence is spoken of
    returns    the loss, 0-dim; and sums over trained tokens: those of `finish_loss`, and the loss's own
    raises     MissingLogProbsError where log-probs that it needs are None; DataError where tokens are packed
               in one row, a sequence is spoken of, and sequence_ids is None

Every definition is in ``docs/objectives.md``, a worked example in ``docs/losses.md``.
"""

from __future__ import annotations

from typing import Any

from trainer.extensions import BoundLoss, Loss
from trainer.losses._clipped import decoupled_ppo, ppo_clip, sapo
from trainer.losses._corrections import correction_weights
from trainer.losses._covariance import clip_cov, kl_cov
from trainer.losses._distillation import teacher_divergence
from trainer.losses._divergences import k3, log_ratio, reference_kl
from trainer.losses._importance_weighted import cispo, policy_gradient, weighted_sft
from trainer.losses._inputs import LossInputs
from trainer.losses._sequence_level import gmpo, gspo, luspo, vespo
from trainer.losses._terms import finish_loss, policy_metrics
from trainer.losses._trust_region import dppo_kl, dppo_tv, ipo, prime
from trainer.options import ClipOptions, CorrectionOptions, KlOptions, ObjectiveOptions, RatioOptions

__all__ = [
    "ClipOptions",
    "CorrectionOptions",
    "KlOptions",
    "LossInputs",
    "ObjectiveOptions",
    "RatioOptions",
    "cispo",
    "clip_cov",
    "correction_weights",
    "decoupled_ppo",
    "dppo_kl",
    "dppo_tv",
    "finish_loss",
    "gmpo",
    "gspo",
    "ipo",
    "k3",
    "kl_cov",
    "log_ratio",
    "luspo",
    "policy_gradient",
    "policy_metrics",
    "ppo_clip",
    "prime",
    "reference_kl",
    "resolve_loss",
    "sapo",
    "teacher_divergence",
    "vespo",
    "weighted_sft",
]


def resolve_loss(name: str, **options: Any) -> BoundLoss:
    """Find a loss by its name, ours or `module:function`, and give it its options; call it with `LossInputs`.

    Raises:
        ConfigurationError: There is no such loss or option, or the option's value is not allowed.
    """
    loss: Loss[Any] = Loss.find(name)
    return loss.bind(loss.called_options(options))

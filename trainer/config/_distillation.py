"""Distillation from a teacher whose log-probs environments send: section `distillation`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.config._base import Section


class DistillationSettings(Section):
    """Learning from a teacher's candidate tokens, which environments send as distill_token_ids."""

    mode: Literal["none", "sampled_token", "forward_kl", "reverse_kl"] = "none"
    """sampled_token: the teacher's log-prob of the sampled token minus the sampler's is added to the token's
    advantage (on-policy distillation). forward_kl, reverse_kl: a loss over the teacher's candidates of each
    position, see docs/objectives.md. none: the fields are not used. In the other modes a group that lacks
    them, at any trained token, is set aside."""
    coefficient: float = Field(default=1.0, gt=0)
    """Weight of the teacher."""
    reward_coefficient: float = Field(default=1.0, ge=0)
    """Weight of the rewards' part of the objective beside it. 0: the teacher alone."""

    @property
    def is_loss(self) -> bool:
        """Whether there is a term of its own beside the loss."""
        return self.mode in ("forward_kl", "reverse_kl")

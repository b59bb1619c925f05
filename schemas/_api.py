"""The small requests and replies of the Atropos API: registration, status, pushing groups.

Each class names its route and who sends it. Groups and batches have modules of their own.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AllowInfNan, Field

from schemas._wire import WireModel


class Registration(WireModel):
    """``POST /register``, sent by the trainer.

    Only the first registration counts: the server accepts later ones and keeps the first values.
    """

    wandb_group: str = ""
    """Weights & Biases group for the environments' own logs. Empty: none."""
    wandb_project: str = ""
    """Weights & Biases project for the environments' own logs. Empty: none."""
    batch_size: int = Field(gt=0)
    """Sequences (not groups) per batch."""
    max_token_len: int = Field(gt=0)
    """Longest sequence, in tokens, that environments should send."""
    checkpoint_dir: str = ""
    """Directory in which environments keep their own checkpoints. Empty: none."""
    save_checkpoint_interval: int = -1
    """Batches between two checkpoints of an environment. 0 or less: environments save nothing."""
    starting_step: int = Field(default=0, ge=0)
    """Step that environments start to count from; above 0 they load their own checkpoint."""
    num_steps: int = Field(ge=-1)
    """Steps of the whole run. -1: unknown."""


class EnvironmentRegistration(WireModel):
    """``POST /register-env``, sent by an environment."""

    max_token_length: int = Field(gt=0)
    """Longest sequence, in tokens, that this environment sends."""
    desired_name: str
    """Name in logs; the server appends a number."""
    weight: Annotated[float, AllowInfNan(False)] = Field(default=1.0, ge=0)
    """Share of the data wanted from this environment, relative to the others."""
    group_size: int = Field(gt=0)
    """Sequences per group."""
    min_batch_allocation: Annotated[float, AllowInfNan(False)] | None = Field(default=None, ge=0, le=1)
    """Smallest share of every batch for this environment. None: no guarantee."""


class EnvironmentRegistrationReply(WireModel):
    """Reply to ``POST /register-env``. Everything but `status` is None until the trainer has polled once."""

    status: str
    """``"success"``, or a text that asks to wait for the trainer."""
    env_id: int | None = None
    """Number of the environment; it goes into every group."""
    starting_step: int | None = None
    """Batches formed so far, counted from the trainer's starting step."""
    num_steps: int | None = None
    """As the trainer registered it."""

    @property
    def accepted(self) -> bool:
        """Whether the environment is registered (False: ask again in a second)."""
        return self.status == "success"


class EnvironmentIdentifier(WireModel):
    """Body of ``GET /status-env`` (a GET with a body)."""

    env_id: int = Field(ge=0)
    """Number from the registration."""


class EnvironmentStatus(WireModel):
    """Reply to ``GET /status-env``: what an environment needs to decide whether to produce more."""

    current_step: int
    """Batches formed so far; not a policy version."""
    queue_size: int
    """Groups waiting, in units of this environment's group size."""
    unallocated_fraction: float
    """Share of a batch that no environment has reserved."""
    env_weight: float
    """Share of the data wanted from this environment, normalised over the connected ones."""
    self_queue_size: int = 0
    """Groups of this environment waiting."""
    max_group_size: int = 1
    """Largest group waiting."""


class StatusReply(WireModel):
    """Reply to ``GET /status``."""

    current_step: int
    """Batches formed (not trained) so far: not a policy version."""
    queue_size: int
    """Groups (not sequences) waiting in the queue."""


class InfoReply(WireModel):
    """Reply to ``GET /info``."""

    batch_size: int
    """Sequences per batch. -1: no trainer has registered."""
    max_token_len: int
    """Longest sequence in tokens. -1: no trainer has registered."""

    @property
    def registered(self) -> bool:
        """Whether the API knows of a trainer."""
        return self.batch_size > 0

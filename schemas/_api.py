"""The small requests and replies of the Atropos API: registration and status.

Each class names its route and who sends it. Groups and batches have modules of their own.
"""

from __future__ import annotations

from pydantic import Field

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


class EnvironmentIdentifier(WireModel):
    """Body of ``GET /status-env`` (a GET with a body)."""

    env_id: int = Field(ge=0)
    """Number of the environment, in the order of registration."""


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

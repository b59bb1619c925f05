"""What verl loads by its entry point `verl.plugins`: importing it registers everything.

Verl says nothing where a plugin cannot be imported (a line at level DEBUG), and then does not know us.
`require_loaded` turns that into an error.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from verl.checkpoint_engine import CheckpointEngineRegistry
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
from verl.workers.rollout.replica import RolloutReplicaRegistry

from trainer.errors import ConfigurationError
from verl_integration.checkpoint_engine import DirectoryCheckpointEngine
from verl_integration.losses import POLICY_LOSS_PREFIX, POLICY_LOSSES, register_policy_losses
from verl_integration.settings import SERVERS_BESIDE
from verl_integration.trainer import AtroposTrainer

GROUP = "verl.plugins"
NAME = "atropos"


register_policy_losses()
RolloutReplicaRegistry.register(SERVERS_BESIDE, lambda: object)  # verl asks for a class, and makes none of it


def require_loaded() -> None:
    """See that verl finds us by its entry point, in its workers too, and knows all of ours.

    Raises:
        ConfigurationError: It does not.
    """
    if not any(each.value == __name__ for each in entry_points(group=GROUP, name=NAME)):
        raise ConfigurationError(
            f"verl cannot find atropos-trainer: this environment has no entry point {NAME} in {GROUP}. "
            "Install the package into it (pip install --no-deps); a path to it is not enough"
        )
    known = {
        f"the policy losses {POLICY_LOSS_PREFIX}*": all(
            POLICY_LOSS_PREFIX + name in POLICY_LOSS_REGISTRY for name in POLICY_LOSSES
        ),
        f"the trainer {NAME}": TRAINER_REGISTRY.get(NAME) is AtroposTrainer,
        f"the checkpoint engine {SERVERS_BESIDE}": (
            CheckpointEngineRegistry.get(SERVERS_BESIDE) is DirectoryCheckpointEngine
        ),
    }
    missing = [what for what, is_known in known.items() if not is_known]
    if missing:
        raise ConfigurationError(
            f"verl has something else under the name of {' and '.join(missing)}: another plugin took it"
        )

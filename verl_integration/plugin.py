"""What verl loads by its entry points `verl.plugins`, in its workers too: importing it registers ours."""

from verl.workers.rollout.replica import RolloutReplicaRegistry

import verl_integration.trainer  # noqa: F401 - and with it our losses and our checkpoint engine
from verl_integration.settings import SERVERS_BESIDE

RolloutReplicaRegistry.register(SERVERS_BESIDE, lambda: object)  # verl asks for a class, and makes none of it
